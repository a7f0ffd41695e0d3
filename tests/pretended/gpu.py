"""A GPU that is not there: tensors that say they are on `cuda:0` and are computed on the CPU.

What a program does with a device is then seen on a machine without one: an operation between tensors of the CPU and of
the GPU is refused as CUDA refuses it, and reads of values, for which the host would wait, are written down in `reads`
(but for those inside an operation, as of an index of truth values), and copies from memory not pinned in `waits`.
Speed, kernels' numbers and memory are not seen. `gpu.cpp`, compiled, must be loaded before torch is imported.
"""

# ruff: noqa: E402 (the library comes before torch)
import ctypes
import os
import traceback
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # the row kernel on host memory
ctypes.CDLL(os.environ["PRETENDED_GPU"], ctypes.RTLD_GLOBAL)

import torch
import torch._dynamo
import torch._inductor.utils  # looks for a real GPU when it is imported
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from codistill.kernels import triton_rows

HERE = torch.device("cuda", 0)
aten = torch.ops.aten
reads: list[str] = []
waits: set[str] = set()  # copies to the GPU from memory that is not pinned: files of the library that were under way

_MIXES = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
_READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.masked_select.default}
# bfloat16 products with a float32 result, which only CUDA has.
_WIDE = {
    aten.mm.dtype_out: lambda a, b, dtype, out: torch.mm(a.to(dtype), b.to(dtype), out=out),
    aten.addmm.dtype_out: lambda c, a, b, dtype, out, **k: torch.addmm(c, a.to(dtype), b.to(dtype), out=out, **k),
}


class Pretended(torch.Tensor):
    """`inner`, a tensor of the CPU, as one of the GPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.size(), device=HERE, **layout)
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def tolist(self):
        _read()
        return self.inner.tolist()

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __reduce_ex__(self, protocol):
        raise TypeError("a tensor of the GPU was pickled")


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args: tuple, kwargs: dict) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = [x for x in tensors if isinstance(x, Pretended)]
    device = kwargs.get("device")
    goes_there = bool(there) if device is None else torch.device(device).type == "cuda"
    if func is aten.copy_.default:
        goes_there = isinstance(args[0], Pretended)
    if there and func not in _MIXES and any(x.dim() > 0 for x in tensors if not isinstance(x, Pretended)):
        raise RuntimeError(f"{func.name()}: expected all tensors to be on the same device, but some are on the CPU")
    if there and (func in _READS or (func in (aten._to_copy.default, aten.copy_.default) and not goes_there)):
        _read()
    if func is aten._to_copy.default and goes_there and not there and args[0].dim() > 0 and not args[0].is_pinned():
        waits.add(" ".join(Path(f.filename).name for f in traceback.extract_stack() if "/codistill/" in f.filename))
    found = _computed(func, args, dict(kwargs))
    if not goes_there:
        return args[0] if func is aten.copy_.default else found
    found = tree_map(lambda x: Pretended(x) if isinstance(x, torch.Tensor) else x, found)
    if device is not None or not there:
        return found
    return return_and_correct_aliasing(func, args, kwargs, found)


def _computed(func, args: tuple, kwargs: dict) -> Any:
    args, kwargs = tree_map(_inner, (args, kwargs))
    if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
        kwargs["device"] = torch.device("cpu")
    return _WIDE.get(func, func)(*args, **kwargs)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Pretended) else value


def _read() -> None:
    place = next((f for f in reversed(traceback.extract_stack()) if "/codistill/" in f.filename), None)
    reads.append("outside" if place is None else f"{Path(place.filename).name}: {place.line}")


chosen: list[torch.device] = []


@contextmanager
def _current(device: torch.device):
    """As `torch.cuda.device`."""
    chosen.append(device)
    try:
        yield
    finally:
        chosen.pop()


class _OnTheHost:
    """The row kernel, given the host's memory; every tensor must be of the GPU."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **options):
            assert all(isinstance(x, Pretended) for x in tree_leaves(args) if isinstance(x, torch.Tensor))
            assert chosen == [HERE]  # Triton launches on the current GPU, whatever the tensors say
            with _disable_current_modes():
                self.kernel[grid](*tree_map(_inner, args), **options)

        return launch


def pretend() -> TorchDispatchMode:
    """From here on there is one GPU, which has bfloat16; its tensors are made inside the mode that this returns."""
    facts = SimpleNamespace(name="a pretended GPU", total_memory=80 << 30, major=9, minor=0, multi_processor_count=132)
    for name, value in {
        "is_available": True, "device_count": 1, "current_device": 0, "set_device": None, "synchronize": None,
        "is_bf16_supported": True, "get_device_name": facts.name, "get_device_properties": facts,
        "get_device_capability": (9, 0), "mem_get_info": (80 << 30, 80 << 30), "max_memory_allocated": 0,
        "memory_allocated": 0, "reset_peak_memory_stats": None, "is_initialized": True, "_lazy_init": None,
    }.items():  # fmt: skip
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    torch.cuda.device = _current
    torch.cuda.default_generators = (SimpleNamespace(manual_seed=lambda seed: None),)
    tensor = torch.tensor

    def from_data(data, *, device=None, **options):  # PyTorch's own moves what it makes where no mode sees it
        return tensor(data, **options) if device is None else tensor(data, **options).to(device)

    torch.tensor = from_data
    torch.inference_mode = torch.no_grad  # in which composite operations come in parts
    torch.__future__.set_swap_module_params_on_conversion(True)  # so that tied parameters stay tied
    triton_rows._row_kernel = _OnTheHost(triton_rows._row_kernel)
    return _Mode()
