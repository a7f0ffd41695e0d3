"""A frozen teacher's outputs, written once and read in place of running it (docs/causal.md says when that pays).

A cache holds what a teacher says about every predicted row of the first so many sequences that a run sees, in the order
in which it sees them. That order, and what is masked, is a function of the text, tokenizer, seed, objective and length,
which are the cache's key together with the teacher's own weights and configuration; the size of a batch, its
micro-batches and ranks only cut it into pieces. A fingerprint of each sequence is compared on reading, so that nothing
can be read beside its row.

Shape suffixes: B sequences, N predicted rows of these, D width, K few tokens of a row.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from codistill import schedules
from codistill.config import Run
from codistill.data.order import mix
from codistill.errors import UserError
from codistill.kernels import SparseLogits
from codistill.objectives import Batch
from codistill.provenance import lasting

FORMAT = "codistill-teacher-cache-5"
Kind = Literal["features", "top_k", "sampled"]
# The log-probability of a token that was never drawn: next to nothing in sum, and yet no denormal number, whose
# exponential takes a CPU seventeen times as long (measured).
NEVER = -80.0
_KEY = ("text", "tokenizer", "seed", "objective", "packing", "length", "within_documents", "tokens", "teacher")


@dataclass(frozen=True)
class Layout:
    """What is stored of each predicted row: name → (dtype, entries). One file a name."""

    kind: Kind
    fields: Mapping[str, tuple[torch.dtype, int]]

    @classmethod
    def of(cls, kind: Kind, *, width: int, vocabulary: int, few: int, dtype: torch.dtype) -> "Layout":
        ids = torch.int16 if vocabulary <= 2**15 else torch.int32
        return {
            "features": cls("features", {"features": (dtype, width)}),
            "top_k": cls("top_k", {"ids": (ids, few), "log_p": (dtype, few), "log_rest": (torch.float32, 1)}),
            "sampled": cls("sampled", {"ids": (ids, few), "counts": (torch.uint8, few)}),
        }[kind]

    @property
    def bytes_per_row(self) -> int:
        return sum(dtype.itemsize * entries for dtype, entries in self.fields.values())


class TeacherCache:
    """A cache on disk, memory-mapped. `manifest`: what it holds, and its key."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest
        self.rows_each = manifest["rows_each"]
        self.layout = Layout(
            manifest["kind"],
            {name: (getattr(torch, dtype), entries) for name, (dtype, entries) in manifest["fields"].items()},
        )
        rows = manifest["sequences"] * self.rows_each
        self._fields = {
            name: np.memmap(folder / f"{name}.bin", np.uint8, "r", shape=(rows, dtype.itemsize * entries))
            for name, (dtype, entries) in self.layout.fields.items()
        }
        self._fingerprints = np.memmap(folder / "fingerprints.bin", np.uint64, "r")

    @classmethod
    def open(cls, path: str, field: str) -> "TeacherCache":
        """The cache in a folder; UserError naming `field` where there is none or a file of it is not whole."""
        folder = Path(path)
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            if manifest["format"] != FORMAT:
                raise UserError(f"{field}: {path!r} is of format {manifest['format']!r}, wanted {FORMAT!r}")
            for name, size in manifest["bytes"].items():
                found = (folder / name).stat().st_size
                if found != size:
                    raise UserError(f"{field}: {folder / name} has {found} bytes, wanted {size}; make the cache anew")
            return cls(folder, manifest)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{field}: {path!r} is no teacher cache ({error}); make one with `codistill cache-teacher`"
            ) from None

    def require(self, key: Mapping[str, Any], sequences: int, field: str) -> None:
        """UserError where the run in hand differs from the cache's, naming the first such thing, or is longer."""
        for name in _KEY:
            was, now = self.manifest["key"][name], key[name]
            if was != now:
                raise UserError(
                    f"{field}: {str(self.folder)!r} is a cache of another run: its {name} is {_short(was)}, and here "
                    f"it is {_short(now)}; make one for this run with `codistill cache-teacher`"
                )
        held = self.manifest["sequences"]
        if held < sequences:
            raise UserError(
                f"{field}: {str(self.folder)!r} holds {held} sequences, and the run needs {sequences}; make a longer "
                "one with `codistill cache-teacher`"
            )

    def read(self, first: int, batch: Batch) -> Tensor | SparseLogits | None:
        """What the teacher says about the rows of `batch`, whose first sequence is the run's sequence `first`, on the
        CPU: features (N, D) in float32, or sparse logits. None beyond the cache's end; UserError for other text."""
        prints_B = fingerprints(batch)
        if first + len(prints_B) > self.manifest["sequences"]:
            return None
        if not np.array_equal(self._fingerprints[first : first + len(prints_B)], prints_B):
            raise UserError(f"{self.folder}: sequence {first} is not the one that was cached; make the cache anew")
        rows = slice(first * self.rows_each, (first + len(prints_B)) * self.rows_each)
        if self.layout.kind == "features":
            return self._tensor("features", rows).float()
        if self.layout.kind == "top_k":
            log_rest_N = self._tensor("log_rest", rows)[:, 0]
            return SparseLogits(self._tensor("ids", rows).long(), self._tensor("log_p", rows).float(), log_rest_N)
        counts_NK = self._tensor("counts", rows).float()
        log_p_NK = (counts_NK / counts_NK.shape[1]).log()
        return SparseLogits(self._tensor("ids", rows).long(), log_p_NK, torch.full((len(log_p_NK),), NEVER))

    def _tensor(self, name: str, rows: slice) -> Tensor:
        dtype, _ = self.layout.fields[name]
        return torch.from_numpy(np.array(self._fields[name][rows])).view(dtype)


def fingerprints(batch: Batch) -> np.ndarray:
    """One uint64 for each sequence, of what is shown of it, what is asked and where: (B,)."""
    ids_BT = batch.inputs["input_ids"].numpy()
    sums_B = _hashed(ids_BT)
    for number, tensor in enumerate((batch.labels_N, batch.rows_N % ids_BT.shape[1]), start=1):
        sums_B = mix(sums_B + np.uint64(number)) + _hashed(tensor.numpy().reshape(len(ids_BT), -1))
    return sums_B


def key_of(run: Run, text: str, tokenizer: str, teacher: nn.Module) -> dict[str, Any]:
    """What a cache's contents depend on; `text` and `tokenizer` are the prepared text's identity and the hash."""
    objective = asdict(run.objective)
    if run.objective.name == "clm":
        del objective["mask_rate"], objective["whole_word"]  # which have no part in it
    data = run.data
    rows = (data.packing, data.length, data.within_documents, data.tokens)
    facts = (text, tokenizer, run.seed, objective, *rows, _hash(teacher))
    return dict(zip(_KEY, facts, strict=True))


def taught_steps(run: Run, teacher: str) -> int:
    """Steps from the run's beginning to the last one in which an edge of `teacher` weighs something."""
    weights = [schedules.build(edge.weight, run.steps) for edge in run.distillation if edge.teacher == teacher]
    return next((step + 1 for step in reversed(range(run.steps)) if any(weight(step) for weight in weights)), 0)


def open_for(run: Run, text: str, tokenizer: str, models: Mapping[str, nn.Module]) -> dict[str, TeacherCache]:
    """The caches that members of `run` name, each checked against the run; UserError for one that is not its own."""
    caches = {}
    for name, member in run.members.items():
        if member.cached is None:
            continue
        field = f"members.{name}.cached"
        cache = TeacherCache.open(member.cached, field)
        _check_edges(run, name, cache, field)
        cache.require(key_of(run, text, tokenizer, models[name]), taught_steps(run, name) * run.batch.sequences, field)
        caches[name] = cache
    return caches


def _check_edges(run: Run, name: str, cache: TeacherCache, field: str) -> None:
    for edge in run.distillation:
        if edge.teacher == name and cache.layout.kind != "features" and edge.divergence == "squared_error":
            raise UserError(
                f"{field}: the edge to {edge.student} has squared_error, which compares logits, and "
                f"{cache.layout.kind} keeps probabilities; cache features"
            )
        plain = edge.divergence == "forward_kl" and edge.temperature == 1
        if edge.teacher == name and cache.layout.kind == "sampled" and not plain:
            raise UserError(
                f"{field}: sampled logits are unbiased for forward_kl at temperature 1 only, and the edge to "
                f"{edge.student} has {edge.divergence} at {edge.temperature:g}; cache features or top_k"
            )


def _hash(model: nn.Module) -> str:
    """SHA-256 of the parameters, buffers and what the configuration says of the model, whatever folder they came from.

    Rotary bases, epsilons and windows stand in no weight, and change what it says all the same.
    """
    settings = lasting(cast(PreTrainedModel, model).config.to_diff_dict())
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _hashed(values_BN: np.ndarray) -> np.ndarray:
    place_N = np.arange(values_BN.shape[1], dtype=np.uint64) << np.uint64(32)
    return mix(values_BN.astype(np.uint64) ^ place_N).sum(axis=1, dtype=np.uint64)


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 12 else str(value)
