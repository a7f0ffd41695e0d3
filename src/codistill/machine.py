"""Making the most of a machine: its precision, bits that repeat, compiled layers, and memory that is kept."""

import ctypes
import os
import platform
import sys
import sysconfig
from collections.abc import Iterable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Literal

import torch
from torch import nn

from codistill.distributed import layers
from codistill.errors import first_line, one_line

_MOST_VARIANTS = 128
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h


def best_precision(device: torch.device) -> Literal["float32", "bfloat16"]:
    """What `device` is good at: bfloat16 where it has instructions for it."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    # PyTorch 2.11 has no `get_capabilities`: there a CPU counts as one without.
    has: dict = getattr(torch.cpu, "get_capabilities", dict)()
    return "bfloat16" if has.get("avx512_bf16") or has.get("amx_bf16") else "float32"


def device_name(device: torch.device) -> str:
    """Which GPU it is, or which processor, with those of its abilities that matrix products depend on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    about = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    if "model name" not in about:  # as on ARM
        return platform.machine()
    flags = about.get("flags", "").split()
    abilities = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    family = f"family {about.get('cpu family')} model {about.get('model')}"
    return f"{about['model name']} ({'; '.join(filter(None, (family, ', '.join(abilities))))})"


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of each package; of PyTorch with its build (2.13.0+cu130), which what was installed need not say."""
    return {name: str(torch.__version__) if name == "torch" else version(name) for name in packages}


def compiler_failure(error: BaseException) -> str | None:
    """What PyTorch's compiler failed at, in a line; None if it was something else that raised `error`. It fails before
    what was to be compiled has computed anything."""
    compiler = sys.modules.get("torch._dynamo.exc")  # nobody who has not compiled pays for its import
    if compiler is None or not isinstance(error, compiler.TorchDynamoException):
        return None
    cause = getattr(error, "inner_exception", None)  # where its own first line names the backend only
    return f"{type(cause).__name__}: {first_line(cause)}" if cause is not None else first_line(error)


def autocast(device_type: str, precision: torch.dtype) -> torch.autocast:
    """Matrix products in `precision`; with float32 none is cast, whatever surrounds it."""
    return torch.autocast(device_type, precision, enabled=precision != torch.float32)


def compile_layers(model: nn.Module) -> None:
    """Compiles each of the model's repeated layers for the shapes that come, at its first call.

    Layers that are alike share what was compiled, also those of other models in the process, so a deep model costs no
    more than a shallow one.
    """
    # All layers are one function to the compiler. Three widths of a ModernBERT, whose first, local and global layers
    # differ, are nine variants.
    allow_variants()
    for layer in layers(model):
        layer.compile(dynamic=False)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it was raised for want of memory; a CPU's allocator has no error type of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def allow_variants() -> None:
    """Lets PyTorch's compiler make as many variants of a function as a cohort of different members needs: it gives up
    after eight by default."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _MOST_VARIANTS)


def why_not_compile(device: torch.device) -> str | None:
    """What this machine lacks to compile for `device`, in a line; None if nothing."""
    if device.type == "cuda":
        return why_not_triton()
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # InvalidCxxCompiler, or whatever starting the compiler raises
        return one_line(error)
    return _why_no_headers()


def why_not_triton() -> str | None:
    """What this machine lacks to run a kernel of Triton's, in a line; None if nothing. Before its first kernel Triton
    builds a module of C."""
    if not find_spec("triton"):
        return "the package triton is not installed"
    if not (os.environ.get("CC") or which("gcc") or which("clang")):
        return "there is no C compiler (gcc, clang, or what the environment's CC names)"
    return _why_no_headers()


def _why_no_headers() -> str | None:
    """That the header files of this Python are missing, which what both compilers build includes."""
    folders = [Path(sysconfig.get_path("include"))]
    if sys.platform != "win32":  # Debian's own scheme may name another folder than the one its files lie in
        folders.append(Path(sysconfig.get_path("include", "posix_prefix")))
    if sys.platform == "darwin":  # a framework's
        folders.append(Path(sysconfig.get_path("stdlib")).parent.parent / "Headers")
    if any((folder / "Python.h").exists() for folder in folders):
        return None
    return f"{folders[0]} has no Python.h; install the header files of Python (python3-dev on Debian and Ubuntu)"


def be_deterministic() -> None:
    """The same bits each time on a GPU too, for the rest of the process; to be called before anything is done on one,
    since cuBLAS reads once how much workspace it may have, and PyTorch refuses to multiply with what it has by default.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def keep_freed_memory() -> None:
    """Tells the C library (glibc) to hold on to what a step frees: the next step asks for the same again.

    Otherwise it returns memory to the system at every large release, and a tiny model's step spends a tenth of its time
    on getting it back (docs/log.md). The peak does not change. For the rest of the process; elsewhere nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 2**26)
        mallopt(_M_MMAP_THRESHOLD, 2**25)  # the largest that it takes
