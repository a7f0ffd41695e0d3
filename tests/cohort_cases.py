"""Cohorts to put through the vocabulary loss, and an oracle that shares no code with it: torch.nn.functional.

Shape suffixes: N predicted rows, D width of a member, V vocabulary.
"""

import contextlib
import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from codistill.kernels import Edge, head, linear_cohort_loss

NAMES = ("ann", "bob", "cyd", "dan")
WIDTHS = (5, 3, 8, 6)


@dataclass
class Case:
    """Arguments of `linear_cohort_loss`."""

    hidden: dict[str, Tensor]
    weight: dict[str, Tensor]
    bias: dict[str, Tensor]
    labels: Tensor
    hard_weight: dict[str, float]
    edges: list[Edge] = field(default_factory=list)
    row_weight: Tensor | None = None

    def parameters(self) -> dict[str, Tensor]:
        """Every trained tensor by name."""
        kinds = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        named = {f"{kind} {member}": tensor for kind, of in kinds.items() for member, tensor in of.items()}
        return {name: tensor for name, tensor in named.items() if tensor.requires_grad}

    def loss(self, **options):
        return linear_cohort_loss(
            self.hidden,
            self.weight,
            self.bias,
            self.labels,
            hard_weight=self.hard_weight,
            edges=self.edges,
            row_weight=self.row_weight,
            **options,
        )

    def to(self, dtype: torch.dtype) -> "Case":
        """The same case in another type, as new leaves."""
        return self._moved(lambda tensor: tensor.to(dtype), lambda tensor: tensor)

    def on(self, device: str) -> "Case":
        """The same case on a device, as new leaves."""
        move = lambda tensor: tensor if tensor is None else tensor.to(device)  # noqa: E731
        return self._moved(move, move)

    def _moved(self, parameter, other) -> "Case":
        move = lambda of: {m: parameter(t.detach()).requires_grad_(t.requires_grad) for m, t in of.items()}  # noqa: E731
        moved = move(self.hidden), move(self.weight), move(self.bias)
        return Case(*moved, other(self.labels), self.hard_weight, self.edges, other(self.row_weight))


def make(
    members: int = 2,
    rows: int = 7,
    vocabulary: int = 11,
    edges: list[Edge] | None = None,
    frozen: tuple[str, ...] = (),
    seed: int = 0,
    spread: float = 1.0,
) -> Case:
    """A float64 case with random row weights, every fourth of them 0."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    names = NAMES[:members]
    hidden = {m: draw(rows, d) for m, d in zip(names, WIDTHS, strict=False)}
    weight = {m: draw(vocabulary, d) * spread / d**0.5 for m, d in zip(names, WIDTHS, strict=False)}
    bias = {m: draw(vocabulary) / 4 for m in names}
    for member in set(names) - set(frozen):
        for of in (hidden, weight, bias):
            of[member].requires_grad_()
    row_weight = torch.rand(rows, generator=generator)
    row_weight[1::4] = 0
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    hard_weight = dict(zip(names, (1.0, 0.5, 0.0, 2.0), strict=False))
    return Case(hidden, weight, bias, labels, hard_weight, edges or [], row_weight)


def edge_sets(members: int) -> list[list[Edge]]:
    """Every set of edges between so many members; divergences, temperatures and weights go round."""
    pairs = list(itertools.permutations(NAMES[:members], 2))
    settings = itertools.cycle(
        itertools.product(("forward_kl", "reverse_kl", "jensen_shannon"), (1.0, 2.0, 4.0), (0.7, 1.0, 4.0))
    )
    sets = itertools.chain.from_iterable(itertools.combinations(pairs, size) for size in range(len(pairs) + 1))
    make_edge = lambda t, s, divergence, temperature, weight: Edge(t, s, weight, temperature, divergence)  # noqa: E731
    return [[make_edge(*pair, *next(settings)) for pair in chosen] for chosen in sets]


def oracle(case: Case, dtype: torch.dtype = torch.float64):
    """(total, hard, soft) by torch.nn.functional and autograd: logits in `dtype`, what follows in at least float32."""
    above = torch.promote_types(dtype, torch.float32)
    row_weight = torch.ones_like(case.labels) if case.row_weight is None else case.row_weight
    mean = lambda rows: (rows * row_weight.to(above)).sum() / row_weight.to(above).sum()  # noqa: E731
    logits = {
        m: functional.linear(case.hidden[m].to(dtype), case.weight[m].to(dtype), case.bias[m].to(dtype)).to(above)
        for m in case.hidden
    }
    hard = {m: mean(functional.cross_entropy(z, case.labels, reduction="none")) for m, z in logits.items()}
    soft = [mean(_divergence(logits[e.student], logits[e.teacher].detach(), e)) for e in case.edges]
    total = sum(case.hard_weight[m] * loss for m, loss in hard.items())
    total = total + sum(e.weight * loss for e, loss in zip(case.edges, soft, strict=True))
    return total, hard, soft


def _divergence(student_NV: Tensor, teacher_NV: Tensor, edge: Edge) -> Tensor:
    if edge.divergence == "squared_error":
        return functional.mse_loss(student_NV, teacher_NV, reduction="none").mean(-1)
    log_p, log_t = ((z / edge.temperature).log_softmax(-1) for z in (student_NV, teacher_NV))
    kl = lambda a, b: functional.kl_div(b, a, log_target=True, reduction="none").sum(-1)  # noqa: E731
    if edge.divergence == "jensen_shannon":
        log_m = ((log_p.exp() + log_t.exp()) / 2).log()
        rows = (kl(log_p, log_m) + kl(log_t, log_m)) / 2
    else:
        rows = kl(log_t, log_p) if edge.divergence == "forward_kl" else kl(log_p, log_t)
    return rows * edge.temperature**2


def gradients(case: Case, total: Tensor) -> dict[str, Tensor]:
    """The gradient of each trained tensor, 0 where the total does not depend on it."""
    parameters = case.parameters()
    if not parameters:
        return {}
    found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found, strict=True)}


def multiply_as_on_cuda(monkeypatch) -> None:
    """Products from bfloat16 operands to float32 in earnest: on a CPU, which has none, emulated."""
    monkeypatch.setattr(head, "_products", lambda hidden: (torch.bfloat16, contextlib.nullcontext))
    monkeypatch.setattr(head, "multiply", lambda a, b, out: out.copy_(a.to(out.dtype) @ b.to(out.dtype)))
    monkeypatch.setattr(head, "multiply_add", lambda total, a, b: total.add_(a.to(total.dtype) @ b.to(total.dtype)))


def error(got: Tensor, true: Tensor) -> float:
    """|got − true| ÷ |true|, in float64; where nothing is true, |got|."""
    true = true.double()
    return ((got.double() - true).norm() / (true.norm() if true.norm() > 0 else 1)).item()


def worst_error(case: Case, **options) -> float:
    """The largest relative error of a loss or a gradient of the case against the oracle."""
    total, hard, soft = oracle(case)
    out = case.loss(**options)
    pairs = [(out.total, total), *zip(out.hard.values(), hard.values(), strict=True), *zip(out.soft, soft, strict=True)]
    expected, got = gradients(case, total), gradients(case, out.total)
    pairs += [(got[name], expected[name]) for name in expected]
    return max(error(a.detach(), b.detach()) for a, b in pairs)


def close_members(distance: float, offset: float = 0.0, hard: float = 0.0, width: int = 64, seed: int = 5) -> Case:
    """Two bfloat16 members of equal width whose predictions are a small KL apart; weights are float32 parameters."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    rows, vocabulary = 128, 4000
    hidden, weight = draw(rows, width), draw(vocabulary, width) * 1.5 / width**0.5
    bias = {"ann": torch.full((vocabulary,), offset), "bob": torch.full((vocabulary,), offset)}
    return Case(
        {"ann": hidden.bfloat16(), "bob": (hidden + distance * draw(rows, width)).bfloat16()},
        {"ann": weight.bfloat16().float(), "bob": weight.bfloat16().float()},
        bias,
        torch.randint(vocabulary, (rows,), generator=generator),
        {"ann": hard, "bob": hard},
        [Edge("ann", "bob"), Edge("bob", "ann")],
    )


def train(case: Case) -> Case:
    """With features in float32, so that the gradient that comes back is not rounded once more."""
    case.hidden = {m: h.float() for m, h in case.hidden.items()}
    for of in (case.hidden, case.weight, case.bias):
        for tensor in of.values():
            tensor.requires_grad_()
    return case


def errors(case: Case, impl: str = "chunked") -> tuple[torch.Tensor, dict[str, float]]:
    """(the KLs of both edges, the relative error of each gradient) of bfloat16 training, as autocast would do it."""
    exact = case.to(torch.float64)
    true_total, _, soft = oracle(exact)
    true = gradients(exact, true_total)
    with torch.autocast(case.labels.device.type, torch.bfloat16):
        ours = gradients(case, case.loss(impl=impl).total)
    return sum(soft), {name: error(ours[name], true[name]) for name in true}
