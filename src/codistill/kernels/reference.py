"""The loss as its definition: plain autograd, any divergence, N × V tensors. Every kernel must match it."""

import torch
from torch import Tensor
from torch.nn import functional

from codistill.divergences import DIVERGENCES


def reference_loss(hidden, weight, bias, labels, hard_weight, edges, row_weight, denominator):
    """(total, hard, soft) as in `codistill.kernels.loss.CohortLoss`."""
    dtype = torch.promote_types(next(iter(hidden.values())).dtype, torch.float32)
    scale = row_weight.to(dtype) / denominator.to(dtype).clamp_min(torch.finfo(dtype).tiny)
    logits = {m: _logits(hidden[m], weight[m], bias.get(m), dtype) for m in hidden}
    hard, soft, total = {}, [], torch.zeros((), dtype=dtype, device=labels.device)
    for member, logits_NV in logits.items():
        loss = (functional.cross_entropy(logits_NV, labels, reduction="none") * scale).sum()
        hard[member] = loss.detach()
        total = total + hard_weight[member] * loss
    for edge in edges:
        rows = DIVERGENCES[edge.divergence](logits[edge.student], logits[edge.teacher].detach(), edge.temperature)
        loss = (rows * scale).sum()
        soft.append(loss.detach())
        total = total + edge.weight * loss
    return total, hard, tuple(soft)


def _logits(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, dtype: torch.dtype) -> Tensor:
    logits_NV = hidden_ND.to(dtype) @ weight_VD.to(dtype).T
    return logits_NV if bias_V is None else logits_NV + bias_V.to(dtype)
