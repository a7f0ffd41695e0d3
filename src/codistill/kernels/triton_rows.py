"""From a chunk's logits to its row losses and gradients, as one Triton kernel for all members and edges.

One program takes one row of every member through two sweeps over the vocabulary: online logsumexps, then losses and
gradients in place; edges of reverse KL and Jensen–Shannon ask for one more between them, of the divergence that their
gradient contains. The formulas are those of `codistill.kernels.rows`. Nothing here synchronises with the host, and a
weight that varies is read on the device. `TRITON_INTERPRET=1` runs it on a CPU.
Shape suffixes: C rows of a chunk, M members, E edges.
"""

# ruff: noqa: RUF005 (Triton compiles no starred tuples)
# mypy: disable-error-code="assignment"
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from codistill.kernels.head import GivenHead, Head
from codistill.kernels.problem import Problem

KINDS = ("forward_kl", "reverse_kl", "jensen_shannon")
FORWARD, REVERSE = tl.constexpr(0), tl.constexpr(1)
# Columns of the tables that the kernel is compiled for: SOFTMAX[k] and EDGE[e]; P and T are softmaxes.
MEMBER, TEMPERATURE = tl.constexpr(0), tl.constexpr(1)
STUDENT, P, T, KIND = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
LOG_2 = tl.constexpr(0.6931471805599453)


def sweep(problem: Problem, heads: dict[str, Head | GivenHead], logits: dict[str, Tensor], rows: slice):
    """As `codistill.kernels.chunked.Sweep` says."""
    labels_C, scale_C = problem.labels_N[rows], problem.scale_N[rows]
    device = labels_C.device
    hard_MC, at_label_MC = (scale_C.new_empty(len(heads), len(labels_C)) for _ in range(2))
    soft_EC = scale_C.new_empty(len(problem.edges), len(labels_C))
    gradients = [head.gradient(len(labels_C)) for head in heads.values()]
    biases = [head.bias_V for head in heads.values()]
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # Triton launches on the current GPU
        _row_kernel[(len(labels_C),)](
            tuple(logits.values()),
            tuple(z if bias is None else bias for z, bias in zip(logits.values(), biases, strict=True)),
            tuple(gradients),
            tuple(gradient.stride(0) for gradient in gradients),
            labels_C,
            scale_C,
            _on_device(problem.hard_weight.values(), problem.dtype, device),
            _on_device([edge.weight for edge in problem.edges], problem.dtype, device),
            hard_MC,
            soft_EC,
            at_label_MC,
            len(labels_C),
            next(iter(logits.values())).stride(0),
            problem.vocabulary,
            BIASED=tuple(bias is not None for bias in biases),
            TRAINED=tuple(head.trained for head in heads.values()),
            **_tables(problem),
            BLOCK=min(4096, triton.next_power_of_2(problem.vocabulary)),
            num_warps=8,
        )
    return hard_MC, soft_EC, dict(zip(heads, at_label_MC.unbind(), strict=True))


def _tables(problem: Problem) -> dict:
    """What the kernel is compiled for: its softmaxes (the first M are the members' at τ = 1) and its edges."""
    members = problem.members
    sides = [(member, edge.temperature) for edge in problem.edges for member in (edge.student, edge.teacher)]
    softmaxes = list(dict.fromkeys([(member, 1.0) for member in members] + sides))
    at = lambda member, edge: softmaxes.index((member, edge.temperature))  # noqa: E731
    edges = tuple(
        (members.index(e.student), at(e.student, e), at(e.teacher, e), KINDS.index(e.divergence)) for e in problem.edges
    )
    return {
        "SOFTMAX": tuple((members.index(member), float(temperature)) for member, temperature in softmaxes),
        "EDGE": edges,
        "MEMBERS": len(members),
        "SOFTMAXES": len(softmaxes),
        "EDGES": len(edges),
        "SUMS": any(kind != 0 for *_, kind in edges),
    }


def _on_device(weights, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The weights as one tensor, without asking the device for anything."""
    full = lambda weight: torch.full((), float(weight), dtype=dtype, device=device)  # noqa: E731
    here = [w.to(dtype) if isinstance(w, Tensor) and w.device == device else full(w) for w in weights]
    return torch.stack(here) if here else torch.empty(0, dtype=dtype, device=device)


@triton.jit
def _logits(z, bias, BIASED: tl.constexpr, MEMBERS: tl.constexpr, at, columns, vocabulary, other):
    """Of every member, `other` beyond the vocabulary. Whole groups of 16 are loaded: rows and biases are as long."""
    xs = ()
    for m in tl.static_range(MEMBERS):
        x = tl.load(z[m] + at + columns, mask=columns < (vocabulary + 15) // 16 * 16, other=0.0)
        if BIASED[m]:
            x += tl.load(bias[m] + columns, mask=columns < (vocabulary + 15) // 16 * 16, other=0.0)
        xs = xs + (tl.where(columns < vocabulary, x, other),)
    return xs


@triton.jit
def _tempered(xs, SOFTMAX: tl.constexpr, k: tl.constexpr):
    x = xs[SOFTMAX[k][MEMBER]]
    if SOFTMAX[k][TEMPERATURE] != 1.0:
        x = x / SOFTMAX[k][TEMPERATURE]
    return x


@triton.jit
def _log_softmaxes(xs, lse, SOFTMAX: tl.constexpr, SOFTMAXES: tl.constexpr):
    logs = ()
    for k in tl.static_range(SOFTMAXES):
        logs = logs + (_tempered(xs, SOFTMAX, k) - lse[k],)
    return logs


@triton.jit
def _log_mixture(log_p, log_t):
    return tl.maximum(log_p, log_t) + tl.log(1.0 + tl.exp(-tl.abs(log_p - log_t))) - LOG_2


@triton.jit
def _from_student(log_p, log_t, KIND: tl.constexpr):
    """Terms of the divergence that the gradient contains: KL(p ‖ t) of reverse KL, KL(p ‖ m) of Jensen–Shannon."""
    p = tl.exp(log_p)
    if KIND == REVERSE:
        terms = p * (log_p - log_t) - p + tl.exp(log_t)
    else:
        log_m = _log_mixture(log_p, log_t)
        terms = p * (log_p - log_m) - p + tl.exp(log_m)
    return terms


@triton.jit
def _terms(log_p, log_t, KIND: tl.constexpr):
    """Terms of the edge's loss, without τ²."""
    if KIND == FORWARD:
        t = tl.exp(log_t)
        terms = t * (log_t - log_p) - t + tl.exp(log_p)
    elif KIND == REVERSE:
        terms = _from_student(log_p, log_t, KIND)
    else:
        log_m = _log_mixture(log_p, log_t)
        t = tl.exp(log_t)
        terms = (_from_student(log_p, log_t, KIND) + t * (log_t - log_m) - t + tl.exp(log_m)) / 2
    return terms


@triton.jit
def _change(log_p, log_t, divergence, KIND: tl.constexpr):
    """The edge's gradient at the student's logits ÷ τ; `divergence` is the sum of `_from_student`."""
    if KIND == FORWARD:
        change = tl.exp(log_p) - tl.exp(log_t)
    elif KIND == REVERSE:
        change = tl.exp(log_p) * (log_p - log_t - divergence)
    else:
        change = tl.exp(log_p) * (log_p - _log_mixture(log_p, log_t) - divergence) / 2
    return change


@triton.jit
def _gradient(logs, kls, rates, hard_rate, m: tl.constexpr, EDGE: tl.constexpr, EDGES: tl.constexpr):
    g = tl.exp(logs[m]) * hard_rate
    for e in tl.static_range(EDGES):
        if EDGE[e][STUDENT] == m:
            g += _change(logs[EDGE[e][P]], logs[EDGE[e][T]], kls[e], EDGE[e][KIND]) * rates[e]
    return g


@triton.jit
def _logsumexps(z, bias, at, vocabulary, zero, BIASED, SOFTMAX, MEMBERS, SOFTMAXES, BLOCK: tl.constexpr):
    """First sweep: of every softmax, online."""
    peaks = ()
    totals = ()
    for _ in tl.static_range(SOFTMAXES):
        peaks = peaks + (zero - float("inf"),)
        totals = totals + (zero,)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        xs = _logits(z, bias, BIASED, MEMBERS, at, columns, vocabulary, -float("inf"))
        new_peaks = ()
        new_totals = ()
        for k in tl.static_range(SOFTMAXES):
            x = _tempered(xs, SOFTMAX, k)
            peak = tl.maximum(peaks[k], tl.max(x, 0))
            new_totals = new_totals + (totals[k] * tl.exp(peaks[k] - peak) + tl.sum(tl.exp(x - peak), 0),)
            new_peaks = new_peaks + (peak,)
        peaks = new_peaks
        totals = new_totals
    lse = ()
    for k in tl.static_range(SOFTMAXES):
        lse = lse + (peaks[k] + tl.log(totals[k]),)
    return lse


@triton.jit
def _divergences(
    z, bias, at, vocabulary, zero, lse, BIASED, SOFTMAX, EDGE, MEMBERS, SOFTMAXES, EDGES, SUMS, BLOCK: tl.constexpr
):
    """Second sweep, if any edge needs it: the divergence in its gradient; 0 for forward KL."""
    found = ()
    for _ in tl.static_range(EDGES):
        found = found + (zero,)
    if SUMS:
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            xs = _logits(z, bias, BIASED, MEMBERS, at, columns, vocabulary, 0.0)
            logs = _log_softmaxes(xs, lse, SOFTMAX, SOFTMAXES)
            new = ()
            for e in tl.static_range(EDGES):
                if EDGE[e][KIND] == FORWARD:
                    new = new + (found[e],)
                else:
                    terms = _from_student(logs[EDGE[e][P]], logs[EDGE[e][T]], EDGE[e][KIND])
                    new = new + (found[e] + tl.sum(tl.where(columns < vocabulary, terms, 0.0), 0),)
            found = new
    return found


@triton.jit
def _losses(found, logs, inside, EDGE: tl.constexpr, EDGES: tl.constexpr):
    """The edges' sums so far and this block's."""
    new = ()
    for e in tl.static_range(EDGES):
        terms = _terms(logs[EDGE[e][P]], logs[EDGE[e][T]], EDGE[e][KIND])
        new = new + (found[e] + tl.sum(tl.where(inside, terms, 0.0), 0),)
    return new


@triton.jit
def _row_kernel(
    z,
    bias,
    gradient,
    gradient_stride,
    labels,
    scale,
    hard_weight,
    edge_weight,
    hard,
    soft,
    at_label,
    rows,
    stride,
    vocabulary,
    BIASED: tl.constexpr,
    TRAINED: tl.constexpr,
    SOFTMAX: tl.constexpr,
    EDGE: tl.constexpr,
    MEMBERS: tl.constexpr,
    SOFTMAXES: tl.constexpr,
    EDGES: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at, label, scale_row = row * stride, tl.load(labels + row), tl.load(scale + row)
    zero = scale_row * 0.0
    lse = _logsumexps(z, bias, at, vocabulary, zero, BIASED, SOFTMAX, MEMBERS, SOFTMAXES, BLOCK)
    kls = _divergences(
        z, bias, at, vocabulary, zero, lse, BIASED, SOFTMAX, EDGE, MEMBERS, SOFTMAXES, EDGES, SUMS, BLOCK
    )
    rates, losses, hard_rates = (), (), ()
    for e in tl.static_range(EDGES):
        rates = rates + (scale_row * tl.load(edge_weight + e) * SOFTMAX[EDGE[e][P]][TEMPERATURE],)
        losses = losses + (zero,)
    # The label's entry of each gradient is kept apart, in full precision; take it before anything is overwritten.
    label_xs = _logits(z, bias, BIASED, MEMBERS, at, label, vocabulary, 0.0)
    label_logs = _log_softmaxes(label_xs, lse, SOFTMAX, SOFTMAXES)
    for m in tl.static_range(MEMBERS):
        hard_rates = hard_rates + (scale_row * tl.load(hard_weight + m),)
        label_g = _gradient(label_logs, kls, rates, hard_rates[m], m, EDGE, EDGES)
        tl.store(at_label + m * rows + row, label_g - hard_rates[m])
        tl.store(hard + m * rows + row, -label_logs[m])
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        xs = _logits(z, bias, BIASED, MEMBERS, at, columns, vocabulary, 0.0)
        logs = _log_softmaxes(xs, lse, SOFTMAX, SOFTMAXES)
        losses = _losses(losses, logs, columns < vocabulary, EDGE, EDGES)
        # Gradients lie over the logits, and narrower ones over logits that another thread may not have read yet.
        tl.debug_barrier()
        for m in tl.static_range(MEMBERS):
            if TRAINED[m]:
                g = tl.where(columns == label, 0.0, _gradient(logs, kls, rates, hard_rates[m], m, EDGE, EDGES))
                to = gradient[m] + row * gradient_stride[m] + columns
                tl.store(to, g.to(gradient[m].dtype.element_ty), mask=columns < (vocabulary + 15) // 16 * 16)
    for e in tl.static_range(EDGES):
        tau = SOFTMAX[EDGE[e][P]][TEMPERATURE]
        tl.store(soft + e * rows + row, losses[e] * (tau * tau))
