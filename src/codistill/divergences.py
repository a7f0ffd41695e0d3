"""Divergences between two predictions: rows in, one loss per row out. The reference formulas.

A kernel may be faster than these functions, never different (docs/equations.md).
Shape suffixes: N predicted rows, V vocabulary.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Divergence = Callable[[Tensor, Tensor, float], Tensor]


def forward_kl(student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """τ² · KL(teacher ‖ student) of every row, in nats: shape (N,).

        t = softmax(teacher / τ),  p = softmax(student / τ),  loss = τ² Σ_v t_v (ln t_v − ln p_v)

    The student is charged wherever the teacher puts mass. The factor τ² keeps the gradient's scale independent of τ
    (Hinton, Vinyals and Dean 2015, §2). Takes logits of any floating type and computes in at least float32; the
    gradient also reaches `teacher_NV` unless it is detached. Raises ValueError if the shapes differ.
    """
    log_p, log_t = _log_softmaxes(student_NV, teacher_NV, temperature)
    return temperature**2 * _kl(log_t, log_p)


def reverse_kl(student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """τ² · KL(student ‖ teacher) of every row, in nats: shape (N,).

    The student is charged for mass that the teacher does not share (MiniLLM: Gu et al. 2024, eq. 1). Otherwise as
    `forward_kl`.
    """
    log_p, log_t = _log_softmaxes(student_NV, teacher_NV, temperature)
    return temperature**2 * _kl(log_p, log_t)


def jensen_shannon(student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """τ² · JS(student, teacher) of every row, in nats: shape (N,), at most τ² ln 2.

        m = (p + t) / 2,  loss = τ² (KL(p ‖ m) + KL(t ‖ m)) / 2          (Lin 1991, eq. 4.1)

    Symmetric and bounded. Otherwise as `forward_kl`.
    """
    log_p, log_t = _log_softmaxes(student_NV, teacher_NV, temperature)
    log_m = torch.logaddexp(log_p, log_t) - torch.log(torch.full_like(log_p[:, :1], 2))
    return temperature**2 * (_kl(log_p, log_m) + _kl(log_t, log_m)) / 2


def squared_error(student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over the vocabulary of the squared difference of the logits, of every row: shape (N,).

        loss = τ² Σ_v (z_v / τ − z'_v / τ)² / V = Σ_v (z_v − z'_v)² / V       (logit matching: Ba and Caruana 2014)

    Its gradient is 2 (student − teacher) / V at every temperature: for large τ twice forward KL's, except that it also
    asks the student to share the rows' means. Otherwise as `forward_kl`.
    """
    _check_shapes(student_NV, teacher_NV)
    dtype = torch.promote_types(student_NV.dtype, torch.float32)
    return (student_NV.to(dtype) - teacher_NV.to(dtype)).square().mean(-1)


DIVERGENCES: Mapping[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "squared_error": squared_error,
}


def _log_softmaxes(student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    _check_shapes(student_NV, teacher_NV)
    dtype = torch.promote_types(student_NV.dtype, torch.float32)
    return (
        torch.log_softmax(student_NV.to(dtype) / temperature, dim=-1),
        torch.log_softmax(teacher_NV.to(dtype) / temperature, dim=-1),
    )


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Σ[a (ln a − ln b) − a + b] per row: Bregman's form, every term ≥ 0, so close models keep their digits."""
    a, b = log_a.exp(), log_b.exp()
    return (a * (log_a - log_b) - a + b).sum(-1)


def _check_shapes(student_NV: Tensor, teacher_NV: Tensor) -> None:
    if student_NV.shape != teacher_NV.shape:
        raise ValueError(
            f"a divergence compares logits of one shape, not {tuple(student_NV.shape)} (student) with "
            f"{tuple(teacher_NV.shape)} (teacher); cut both to the tokenizer's vocabulary"
        )
