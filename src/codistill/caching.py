"""Writing a teacher cache: what it will take, and then the teacher's outputs for every row of a run.

Shape suffixes: N predicted rows, C rows of a chunk, D width, K few tokens of a row, V vocabulary.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codistill import distributed
from codistill.build import build_frozen, resolved_precision
from codistill.config import Run
from codistill.data.batches import Batches
from codistill.divergences import forward_kl
from codistill.errors import MachineError, UserError
from codistill.files import atomic_folder, to_json, write_file
from codistill.kernels import SparseLogits
from codistill.machine import autocast
from codistill.models import Predictor
from codistill.objectives import Batch
from codistill.progress import Advance, silent
from codistill.seeds import seed_of
from codistill.teacher_cache import FORMAT, NEVER, Kind, Layout, fingerprints, key_of, taught_steps

_ROWS_AT_ONCE = 512


@dataclass
class Plan:
    """What will be cached, and what it will take: `bytes_per_token` of the run's text, `total_bytes` in all."""

    run: Run
    name: str
    layout: Layout
    predictor: Predictor
    batches: Batches
    key: dict[str, Any]
    steps: int
    rows_each: int
    _divergences: list[Tensor] = field(default_factory=list)

    @property
    def sequences(self) -> int:
        return self.steps * self.run.batch.sequences

    @property
    def bytes_per_token(self) -> float:
        return (self.layout.bytes_per_row * self.rows_each + 8) / self.run.data.length

    @property
    def total_bytes(self) -> int:
        return self.sequences * (self.layout.bytes_per_row * self.rows_each + 8)

    def __str__(self) -> str:
        entries = ", ".join(f"{name} {count} × {_name(dtype)}" for name, (dtype, count) in self.layout.fields.items())
        return (
            f"{self.layout.kind} of {self.name}: {entries} a predicted row, {self.bytes_per_token:,.1f} bytes a token, "
            f"{self.total_bytes / 1e6:,.1f} MB for {self.steps:,} steps"
        )


def plan(
    run: Run, name: str, *, kind: Kind = "features", few: int = 64, dtype: str = "float32", device: str | None = None
) -> Plan:
    """What it takes to cache the frozen member `name` of `run` for the steps in which it teaches.

    `few`: tokens of a row that top_k and sampled keep; `dtype`: of stored features and log-probabilities, float32 or
    bfloat16. Raises UserError for what cannot be cached.
    """
    if name not in run.members or not run.members[name].frozen:
        others = ", ".join(n for n, member in run.members.items() if member.frozen) or "none"
        raise UserError(f"--member {name}: only a frozen member can be cached; frozen are {others}")
    steps = taught_steps(run, name)
    if not steps:
        raise UserError(f"--member {name}: it teaches nobody at any step, so there is nothing to cache")
    place = distributed.start("single", device).device
    run = replace(run, precision=resolved_precision(run, place))
    frozen = build_frozen(run, name, place)
    vocabulary, width = frozen.predictor.vocabulary, _width(frozen.predictor)
    most = 255 if kind == "sampled" else vocabulary
    if kind != "features" and not 0 < few <= most:
        raise UserError(f"--k {few}: {kind} keeps between 1 and {most} tokens of a row")
    layout = Layout.of(kind, width=width, vocabulary=vocabulary, few=few, dtype=getattr(torch, dtype))
    first = frozen.batches.at(0)[0]
    return Plan(
        run=run,
        name=name,
        layout=layout,
        predictor=frozen.predictor.eval().requires_grad_(False),
        batches=frozen.batches,
        key=key_of(run, frozen.text, frozen.tokenizer, frozen.predictor.model),
        steps=steps,
        rows_each=len(first.rows_N) // len(first.inputs["input_ids"]),
    )


def write(plan: Plan, out: Path, advance: Advance = silent) -> dict[str, Any]:
    """Writes the cache to the folder `out`, whole or not at all, and returns its manifest.

    `kl_error` in it is the mean of KL(teacher ‖ cached teacher) over the rows in nats, which is the bias of top_k and
    of rounded features; None for sampled logits, whose expected gradient is exact. Raises UserError where there is a
    folder already, MachineError where the disk is too small.
    """
    if out.exists():
        raise UserError(f"{out} exists; give another --out, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < plan.total_bytes:
        raise MachineError(f"{out}: the cache takes {plan.total_bytes:,} bytes and {free:,} are free; free some space")
    plan._divergences.clear()
    with atomic_folder(out) as fresh:
        names = [*plan.layout.fields, "fingerprints"]
        files = {name: (fresh / f"{name}.bin").open("wb") for name in names}
        try:
            for step in range(plan.steps):
                for index, batch in enumerate(plan.batches.at(step)):
                    files["fingerprints"].write(fingerprints(batch).tobytes())
                    for name, tensor in _outputs(plan, batch, seed_of(plan.run.seed, "sampled", step, index)).items():
                        files[name].write(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
                advance(step + 1)
        finally:
            for file in files.values():
                file.close()
        manifest = _manifest(plan, {path.name: path.stat().st_size for path in sorted(fresh.iterdir())})
        write_file(fresh / "manifest.json", to_json(manifest, indent=1))
    return manifest


def _manifest(plan: Plan, sizes: dict[str, int]) -> dict[str, Any]:
    errors = torch.stack(plan._divergences).sum(0).tolist() if plan._divergences else None
    return {
        "format": FORMAT,
        "kind": plan.layout.kind,
        "fields": {name: [_name(dtype), entries] for name, (dtype, entries) in plan.layout.fields.items()},
        "rows_each": plan.rows_each,
        "sequences": plan.sequences,
        "steps": plan.steps,
        "kl_error": errors and errors[0] / max(errors[1], 1),
        "precision": plan.run.precision,
        "member": plan.name,
        "path": plan.run.members[plan.name].path,
        "key": plan.key,
        "bytes": sizes,
    }


@torch.no_grad()
def _outputs(plan: Plan, batch: Batch, seed: int) -> dict[str, Tensor]:
    """What is stored of a micro-batch, by name; adds to the divergences."""
    here = batch.to(plan.predictor.device)
    precision = getattr(torch, plan.run.precision)
    with autocast(here.labels_N.device.type, precision):
        features_ND = plan.predictor(here.inputs, here.rows_N).float()
    parts = [
        _chunk(plan, features_CD, weight_C, seed + number)
        for number, (features_CD, weight_C) in enumerate(_chunks(features_ND, here.weight_N))
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in plan.layout.fields}


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.split(_ROWS_AT_ONCE) for tensor in tensors), strict=True)


def _chunk(plan: Plan, features_CD: Tensor, weight_C: Tensor, seed: int) -> dict[str, Tensor]:
    kind, fields = plan.layout.kind, plan.layout.fields
    if kind == "features":
        stored_CD = features_CD.to(fields["features"][0])
        if stored_CD.dtype != torch.float32:
            _note_error(plan, _log_p(plan, stored_CD.float()), _log_p(plan, features_CD), weight_C)
        return {"features": stored_CD}
    log_p_CV = _log_p(plan, features_CD)
    ids_type, few = fields["ids"]
    if kind == "sampled":
        draw = torch.Generator(log_p_CV.device).manual_seed(seed)
        ids_CK = torch.multinomial(log_p_CV.exp(), few, replacement=True, generator=draw)
        counts_CV = torch.zeros_like(log_p_CV).scatter_add_(1, ids_CK, torch.ones_like(ids_CK, dtype=torch.float32))
        return {"ids": ids_CK.to(ids_type), "counts": counts_CV.gather(1, ids_CK).to(torch.uint8)}
    best_CK, ids_CK = log_p_CV.topk(few, -1)
    best_CK, others = best_CK.to(fields["log_p"][0]), log_p_CV.shape[1] - few
    mass_C = log_p_CV.scatter(1, ids_CK, -torch.inf).logsumexp(-1)
    log_rest_C = (
        torch.full_like(mass_C, NEVER) if others == 0 else (mass_C - torch.tensor(others).log()).clamp_min(NEVER)
    )
    sparse = SparseLogits(ids_CK, best_CK.float(), log_rest_C)
    _note_error(plan, sparse.rows(slice(None), torch.empty_like(log_p_CV)), log_p_CV, weight_C)
    return {"ids": ids_CK.to(ids_type), "log_p": best_CK, "log_rest": log_rest_C[:, None]}


def _log_p(plan: Plan, features_CD: Tensor) -> Tensor:
    """Log-probabilities (C, V) in float32, of the tokenizer's vocabulary."""
    return torch.log_softmax(plan.predictor.logits(features_CD), -1)


def _note_error(plan: Plan, cached_CV: Tensor, true_CV: Tensor, weight_C: Tensor) -> None:
    plan._divergences.append(torch.stack([forward_kl(cached_CV, true_CV) @ weight_C, weight_C.sum()]).double().cpu())


def _width(predictor: Predictor) -> int:
    weight_VD = predictor.output_weight
    return predictor.vocabulary if weight_VD is None else weight_VD.shape[1]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
