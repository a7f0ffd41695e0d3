"""One member's output layer, chunk by chunk: its logits, and the gradients that the chunks add up.

Shape suffixes: N predicted rows, C rows of one chunk, D width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor

from codistill.kernels.problem import SparseLogits


class Head:
    """Three matrix products of a trained member, one of a frozen one, over buffers that are made once.

    A chunk: `logits` fills the buffer with z = x Wᵀ, in float32 (float64) whatever the operands; somebody writes the
    finished gradient at the logits into `gradient`, which is the same memory, except for the entry of each row's
    label, which is set to 0 and given to `absorb` in full precision.
    """

    def __init__(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        vocabulary: int,
        chunk_rows: int,
        wants: tuple[bool, bool, bool],
    ):
        device = hidden_ND.device
        self.dtype = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        self.operand, self.precision = _products(hidden_ND)
        self.vocabulary, self.trained = vocabulary, any(wants)
        self.hidden_ND, self.weight_VD = hidden_ND.detach(), weight_VD.detach()
        self.bias_V = None if bias_V is None else _aligned(bias_V.detach()[:vocabulary].to(self.dtype))
        self.operand_VD = self.weight_VD[:vocabulary].to(self.operand)
        self.buffer = torch.empty(chunk_rows, _leading(vocabulary), dtype=self.dtype, device=device)
        self.d_hidden_ND = torch.empty_like(self.hidden_ND) if wants[0] else None
        self.d_weight_VD = torch.zeros_like(self.weight_VD, dtype=self.dtype) if wants[1] else None
        self.d_bias_V = torch.zeros(len(weight_VD), dtype=self.dtype, device=device) if wants[2] else None

    def logits(self, rows: slice) -> Tensor:
        """The chunk's logits without the bias, a view (C, V) of the buffer."""
        x_CD = self.hidden_ND[rows].to(self.operand)
        z_CV = self.buffer[: len(x_CD), : self.vocabulary]
        with self.precision():
            multiply(x_CD, self.operand_VD.T, z_CV)
        return z_CV

    def gradient(self, rows: int) -> Tensor:
        """Where the gradient at the logits goes: (C, V) over the buffer, in the type that the products take."""
        return self.buffer.view(self.operand)[:rows, : self.vocabulary]

    def absorb(self, rows: slice, labels_C: Tensor, at_label_C: Tensor) -> None:
        """Add the chunk: `gradient` by matrix products, `at_label_C` (its entries at the labels) row by row."""
        x_CD, at_label_C1 = self.hidden_ND[rows], at_label_C[:, None]
        g_CV = self.gradient(len(x_CD))
        if self.d_hidden_ND is not None:
            d_x_CD = torch.empty(x_CD.shape, dtype=self.dtype, device=x_CD.device)
            with self.precision():
                multiply(g_CV, self.operand_VD, d_x_CD)
            d_x_CD.addcmul_(self.weight_VD[labels_C].to(self.dtype), at_label_C1)
            self.d_hidden_ND[rows] = d_x_CD
        if self.d_weight_VD is not None:
            with self.precision():
                multiply_add(self.d_weight_VD[: self.vocabulary], g_CV.T, x_CD.to(self.operand))
            self.d_weight_VD.index_add_(0, labels_C, x_CD.to(self.dtype) * at_label_C1)
        if self.d_bias_V is not None:
            self.d_bias_V[: self.vocabulary].add_(g_CV.sum(0, dtype=self.dtype))
            self.d_bias_V.index_add_(0, labels_C, at_label_C)


class GivenHead:
    """What stands for a head where a teacher's logits are given: the same buffer, filled without a product."""

    trained = False
    bias_V = None

    def __init__(self, given: SparseLogits, vocabulary: int, chunk_rows: int, dtype: torch.dtype):
        self.given, self.vocabulary = given, vocabulary
        self.buffer = torch.empty(chunk_rows, _leading(vocabulary), dtype=dtype, device=given.ids.device)

    def logits(self, rows: slice) -> Tensor:
        """The chunk's logits, a view (C, V) of the buffer."""
        count = len(self.given.log_rest[rows])
        return self.given.rows(rows, self.buffer[:count, : self.vocabulary])

    def gradient(self, rows: int) -> Tensor:
        """Never written, since a given teacher is not trained; the kernels want a buffer for each head."""
        return self.buffer[:rows, : self.vocabulary]


def _aligned(bias_V: Tensor) -> Tensor:
    """A copy that can be read to the end of the last cache line, as rows of logits can."""
    return bias_V.new_zeros(_leading(len(bias_V)))[: len(bias_V)].copy_(bias_V)


def _leading(vocabulary: int) -> int:
    """Elements from row to row: whole cache lines, and an odd number of them.

    Unaligned rows cost the products a third of their speed (measured on a CPU with 30,522 columns), and rows a power
    of two apart fall into the same few cache sets.
    """
    return (-(-vocabulary // 16) | 1) * 16


def _products(hidden: Tensor) -> tuple[torch.dtype, Callable[[], AbstractContextManager]]:
    """(the type of the operands, the context of a product): as autocast or the features' type wants them."""
    device = hidden.device.type
    if hidden.dtype == torch.float64:  # which autocast leaves alone
        return torch.float64, nullcontext
    wanted = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if wanted != torch.bfloat16:
        return torch.float32, nullcontext
    return (torch.bfloat16, nullcontext) if device == "cuda" else (torch.float32, _may_round_to_bfloat16)


@contextmanager
def _may_round_to_bfloat16() -> Iterator[None]:
    """Products of float32 tensors that may round their operands to bfloat16, and round nothing else.

    PyTorch has no CPU product from bfloat16 operands to a float32 result. oneDNN has one, behind this switch,
    where the CPU has matrix units (AMX); elsewhere the switch selects its float32 product, the faster of PyTorch's two.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, in the type of `out`."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def multiply_add(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in the type of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif _adds_in_float32():
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(torch.mm(a, b, out_dtype=total.dtype))


@cache
def _adds_in_float32() -> bool:
    """Whether this build's CUDA `addmm` takes a float32 summand to bfloat16 operands; older ones refuse."""
    a = torch.zeros(16, 16, dtype=torch.bfloat16, device="cuda")
    total = torch.zeros(16, 16, device="cuda")
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True
