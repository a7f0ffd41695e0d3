"""A training loop as one would write it by hand, slowly: what any run is compared with.

It takes from codistill the batches and the parameters at the start; the rest is PyTorch and transformers. Every text
goes through its model by itself, one at a time, so that no mask, position or padding can go wrong, and every row, head
and position of a loss is spelled out. Shape suffixes: T position, D width, V vocabulary, N predicted rows.
"""

import copy
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW

from codistill.build import Built
from codistill.config import DistillationConfig, MemberConfig, Run
from codistill.objectives import Batch

_QUERIES_KEYS_VALUES = [
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q_proj", "k_proj", "v_proj"),
    ("c_attn",),
    ("Wqkv",),
]


def value_at(spec: float | dict, step: int, steps: int) -> float:
    """A schedule as docs/run-folder.md has it."""
    if not isinstance(spec, dict):
        return spec
    [(kind, values)] = spec.items()
    if kind == "step":
        return values[max(start for start in values if start <= step)]
    bend = (lambda x: (1 - math.cos(math.pi * x)) / 2) if kind.endswith("cosine") else (lambda x: x)
    if kind in ("linear", "cosine"):
        start, end, until = [*values, steps][:3]
        return start + (end - start) * bend(min(step / until, 1))
    peak, warmup = values[0], round(values[1] * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 - bend(min((step - warmup) / max(steps - warmup, 1), 1)))


@dataclass
class Text:
    """One text of a batch: its tokens, and where it stands among the flattened positions."""

    ids_T: Tensor
    first: int


def texts_of(batch: Batch) -> list[Text]:
    """Rows without their padding, cut where positions begin anew."""
    ids_BT = batch.inputs["input_ids"]
    found = []
    for row, ids_T in enumerate(ids_BT):
        length = len(ids_T) if batch.lengths_B is None else int(batch.lengths_B[row])
        position_T = batch.inputs["position_ids"][row] if "position_ids" in batch.inputs else torch.arange(length)
        begins = [at for at in range(length) if position_T[at] == 0]
        for begin, end in zip(begins, [*begins[1:], length], strict=True):
            found.append(Text(ids_T[begin:end], row * len(ids_T) + begin))
    return found


def asked(batch: Batch, *, is_causal: bool) -> list[tuple[int, int]]:
    """(position, label) of every predicted row: of a causal model all but the last of each text."""
    if is_causal:
        return [
            (text.first + at, label) for text in texts_of(batch) for at, label in enumerate(text.ids_T[1:].tolist())
        ]
    rows = zip(batch.rows_N.tolist(), batch.labels_N.tolist(), batch.weight_N.tolist(), strict=True)
    return [(row, label) for row, label, weight in rows if weight]


class Seen:
    """What a model says about every text of a batch: logits by position, and the outputs of its parts."""

    def __init__(self, model: nn.Module, batch: Batch):
        self.logits: dict[int, Tensor] = {}
        self.outputs: list[dict[nn.Module, Tensor]] = []
        self.layers = next(
            part
            for part in model.modules()
            if isinstance(part, nn.ModuleList) and len(part) == model.config.num_hidden_layers
        )
        for text in texts_of(batch):
            outputs: dict[nn.Module, Tensor] = {}

            def keep(part, _, output, outputs=outputs):
                outputs.setdefault(part, output[0] if isinstance(output, tuple) else output)

            handles = [part.register_forward_hook(keep) for layer in self.layers for part in layer.modules()]
            logits_TV = model(input_ids=text.ids_T[None]).logits[0]
            for handle in handles:
                handle.remove()
            self.outputs.append(outputs)
            self.logits.update({text.first + at: logits_V for at, logits_V in enumerate(logits_TV)})

    def states(self, layer: int) -> list[Tensor]:
        """(T, D) of each text."""
        return [outputs[self.layers[layer - 1]].flatten(0, -2) for outputs in self.outputs]

    def vectors(self, layer: int) -> list[list[Tensor]]:
        """Queries, keys and values, (T, D) each, of each text."""
        by_name = {}
        for name, part in self.layers[layer - 1].named_modules():
            by_name.setdefault(name.split(".")[-1], part)
        names = next(names for names in _QUERIES_KEYS_VALUES if all(name in by_name for name in names))
        found = []
        for outputs in self.outputs:
            given = [outputs[by_name[name]].flatten(0, -2) for name in names]
            found.append(given if len(given) == 3 else list(given[0].chunk(3, dim=-1)))
        return found


def logits_loss(edge: DistillationConfig, student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """(N,) nats, τ² included."""
    if edge.divergence == "squared_error":
        return ((student_NV - teacher_NV) ** 2).mean(-1)
    log_s, log_t = ((z / edge.temperature).log_softmax(-1) for z in (student_NV, teacher_NV))
    kl = lambda a, b: (a.exp() * (a - b)).sum(-1)  # noqa: E731
    if edge.divergence == "jensen_shannon":
        log_m = ((log_s.exp() + log_t.exp()) / 2).log()
        rows_N = kl(log_s, log_m) / 2 + kl(log_t, log_m) / 2
    else:
        rows_N = kl(log_t, log_s) if edge.divergence == "forward_kl" else kl(log_s, log_t)
    return edge.temperature**2 * rows_N


def relation_loss(student_TD: Tensor, teacher_TD: Tensor, heads: int, *, is_causal: bool) -> Tensor:
    """Σ over positions of the mean over heads of KL(teacher ‖ student) of scaled products with all other positions."""
    total = torch.zeros(())
    for student_TE, teacher_TE in zip(student_TD.chunk(heads, -1), teacher_TD.chunk(heads, -1), strict=True):
        for at in range(len(student_TD)):
            end = at + 1 if is_causal else len(student_TD)
            log_s = (student_TE[:end] @ student_TE[at] / student_TE.shape[-1] ** 0.5).log_softmax(-1)
            log_t = (teacher_TE[:end] @ teacher_TE[at] / teacher_TE.shape[-1] ** 0.5).log_softmax(-1)
            total = total + (log_t.exp() * (log_t - log_s)).sum() / heads
    return total


@dataclass
class PlainLoop:
    """The run `run` of what `built` begins with; dropout has to be 0."""

    run: Run
    built: Built
    models: dict[str, nn.Module] = field(init=False)
    metrics: list[dict[str, float]] = field(init=False, default_factory=list)

    def __post_init__(self):
        self.models = {name: copy.deepcopy(model).eval() for name, model in self.built.models.items()}
        self.projections = {n: copy.deepcopy(self.built.cohort.members[n].projections) for n in self.models}
        for model in self.models.values():
            model.set_attn_implementation("eager")
        self.parameters = {n: [*self.models[n].parameters(), *self.projections[n].parameters()] for n in self.models}
        self.optimizers = {name: self._optimizer(name) for name in self.run.trained}
        self.vocabulary = len(self.built.tokenizer)

    def _settings(self, name: str) -> MemberConfig:
        config = self.run.members[name]
        return config if config.twin_of is None else self.run.members[config.twin_of]

    def _optimizer(self, name: str) -> AdamW:
        """Norms and biases do not decay."""
        config, parameters = self._settings(name), self.parameters[name]
        matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return AdamW(groups, lr=0.0, betas=tuple(config.betas), eps=config.eps)

    def train(self) -> "PlainLoop":
        """All steps."""
        for step in range(self.run.steps):
            self._step(step, self.built.batches.at(step))
        return self

    def _step(self, step: int, batches: list[Batch]) -> None:
        rows = max(1, sum(len(self._asked(batch)) for batch in batches))
        positions = sum(len(text.ids_T) for batch in batches for text in texts_of(batch))
        losses: dict[str, float] = {}
        total = torch.zeros(())
        for batch in batches:
            seen = {name: Seen(model, batch) for name, model in self.models.items()}
            for name, weight, loss in self._terms(step, batch, seen, rows, positions):
                total = total + weight * loss
                losses[name] = losses.get(name, 0.0) + loss.item()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        total.backward()
        for name, optimizer in self.optimizers.items():
            clip = self._settings(name).clip
            losses[f"{name}/grad_norm"] = nn.utils.clip_grad_norm_(self.parameters[name], clip).item()
            for group in optimizer.param_groups:
                group["lr"] = value_at(self._settings(name).lr, step, self.run.steps)
            optimizer.step()
        self.metrics.append(losses)

    def _terms(self, step: int, batch: Batch, seen: dict[str, Seen], rows: float, positions: int):
        """(name, weight, loss) of every member and edge."""
        logits = {name: self._logits(seen[name], batch) for name in seen}
        labels_N = torch.tensor([label for _, label in self._asked(batch)], dtype=torch.int64)
        for name in self.run.trained:
            hard = functional.cross_entropy(logits[name], labels_N, reduction="sum") / rows
            yield f"{name}/hard", value_at(self._settings(name).hard_weight, step, self.run.steps), hard
        for edge in self.run.distillation:
            weight = value_at(edge.weight, step, self.run.steps)
            if weight == 0:
                continue
            if edge.kind == "logits":
                soft = logits_loss(edge, logits[edge.student], logits[edge.teacher].detach()).sum() / rows
                yield f"{edge.student}/from_{edge.teacher}", weight, soft
            else:
                below = self._below(edge, seen[edge.student], seen[edge.teacher]) / positions
                yield f"{edge.student}/{edge.kind}_from_{edge.teacher}", weight, below

    def _asked(self, batch: Batch) -> list[tuple[int, int]]:
        return asked(batch, is_causal=self.run.objective.name == "clm")

    def _logits(self, seen: Seen, batch: Batch) -> Tensor:
        """(N, V) of the predicted rows, of which a batch of short texts may have none."""
        logits = [seen.logits[position] for position, _ in self._asked(batch)]
        return torch.stack(logits or [next(iter(seen.logits.values()))])[: len(logits), : self.vocabulary]

    def _below(self, edge: DistillationConfig, student: Seen, teacher: Seen) -> Tensor:
        """Σ over positions, and over pairs of layers."""
        layers = [(len(student.layers), len(teacher.layers))]
        if edge.layers is not None:
            layers = list(zip(edge.layers.student, edge.layers.teacher, strict=True))
        total = torch.zeros(())
        for own, its in layers:
            if edge.kind == "hidden":
                project = self._projection(edge, own, its)
                for state_TD, wanted_TD in zip(student.states(own), teacher.states(its), strict=True):
                    total = total + ((project(state_TD) - wanted_TD.detach()) ** 2).mean(-1).sum()
                continue
            for mine, theirs in zip(student.vectors(own), teacher.vectors(its), strict=True):
                for a, b in zip(mine, theirs, strict=True):
                    is_causal = self.run.objective.name == "clm"
                    total = total + relation_loss(a, b.detach(), edge.relation_heads, is_causal=is_causal)
        return total

    def _projection(self, edge: DistillationConfig, own: int, its: int):
        held = dict(self.projections[edge.student].items())
        return held.get(f"{edge.teacher}-{its}-{own}", lambda state_TD: state_TD)

    @torch.no_grad()
    def held_out_loss(self, name: str) -> float:
        """Mean cross-entropy of the held-out rows."""
        total, rows = 0.0, 0
        for batch in self.built.held_out:
            labels_N = torch.tensor([label for _, label in self._asked(batch)])
            logits_NV = self._logits(Seen(self.models[name], batch), batch)
            total += functional.cross_entropy(logits_NV, labels_N, reduction="sum").item()
            rows += len(labels_N)
        return total / rows
