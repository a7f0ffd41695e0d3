"""Checkpoints: atomic, verified, exact. A checkpoint is parameters, optimizer moments and one integer, the step.

    checkpoints/step-00000100/
        large/config.json, model.safetensors     loads with `from_pretrained`
        large/optimizer.safetensors              one tensor per (moment, parameter)
        large/projections.safetensors            of hidden-state edges to it, where there are any
        manifest.json                            step, score, and the size and SHA-256 of every file; written last

A folder is written beside its place, flushed, and renamed; nothing in it is ever unpickled.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from codistill.distributed import ALONE, Ranks, like, whole
from codistill.errors import UserError
from codistill.files import atomic_folder, remove_folder, sha256, to_json, without_nan


class Trained(NamedTuple):
    """What a checkpoint keeps of a member."""

    model: PreTrainedModel
    optimizer: Optimizer
    projections: nn.Module = nn.ModuleDict()  # trained with the model, and no part of it

    def parameters(self) -> dict[str, Tensor]:
        """All that the optimizer may hold moments of, by name."""
        beside = {f"projections.{name}": parameter for name, parameter in self.projections.named_parameters()}
        return {**dict(self.model.named_parameters()), **beside}


class Snapshot(NamedTuple):
    """A member's state at one step, in host memory: nothing that goes on training can change it."""

    config: str
    parameters: dict[str, Tensor]
    moments: dict[str, Tensor]
    projections: dict[str, Tensor]


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest `newest`, every one whose step `every` divides, each member's `best` among
    those after step `scored_from`, before which scores were of other text."""

    newest: int
    every: int | None = None
    best: bool = False
    scored_from: int = 0


class Saver:
    """Writes checkpoints to `folder` in a thread of its own, one at a time.

    `save` returns once the state is copied to host memory; what went wrong in writing is raised, as MachineError, by
    the next `save` or `finish`. All `ranks` call both: each gives its shards, and rank 0 writes the whole.
    """

    def __init__(self, folder: Path, retention: Retention, ranks: Ranks = ALONE):
        self.folder, self.retention, self.ranks = folder, retention, ranks
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future | None = None

    def save(self, step: int, members: Mapping[str, Trained], scores: Mapping[str, float] | None = None) -> None:
        """Starts a checkpoint of the state before step `step`; `scores` are held-out losses by member."""
        self.ranks.on_main(self._wait)
        snapshots = {name: snapshot(member, self.ranks) for name, member in members.items()}
        if self.ranks.is_main:
            self._writing = self._thread.submit(write, self.folder, step, snapshots, self.retention, scores)

    def finish(self) -> None:
        """Returns once everything is on disk."""
        self.ranks.on_main(self._wait)

    def close(self) -> None:
        """Ends the thread, once what it has begun is on disk."""
        self._thread.shutdown()

    def _wait(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()


def snapshot(member: Trained, ranks: Ranks = ALONE) -> Snapshot:
    """A copy of `member`'s state in rank 0's host memory, which is all of it; the other ranks' copies are empty."""
    parameters, moments = gathered(distinct(member.model), ranks), gathered(_moments(member), ranks)
    projections = gathered(member.projections.state_dict(keep_vars=True), ranks)
    return Snapshot(member.model.config.to_json_string(), parameters, moments, projections)


def distinct(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and buffers of `model` by name; tied ones once, under the first of their names."""
    names: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if names.setdefault(id(tensor), name) == name}


def gathered(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Copies in rank 0's host memory, whole and one after the other; every rank must ask for the same."""
    copies = {}
    for name, tensor in tensors.items():
        entire = whole(tensor.detach())
        if ranks.is_main:
            copies[name] = entire.to("cpu", copy=True, memory_format=torch.contiguous_format)
    return copies


def write(
    folder: Path,
    step: int,
    snapshots: Mapping[str, Snapshot],
    retention: Retention = Retention(newest=2),
    scores: Mapping[str, float] | None = None,
) -> Path:
    """Writes `folder`/step-…, then drops what `retention` does not keep. Raises MachineError; keeps what was there."""
    place = place_of(folder, step)
    with atomic_folder(place) as fresh:
        for name, member in snapshots.items():
            (fresh / name).mkdir()
            (fresh / name / "config.json").write_text(member.config, encoding="utf-8")
            save_file(member.parameters, fresh / name / "model.safetensors", metadata={"format": "pt"})
            save_file(member.moments, fresh / name / "optimizer.safetensors")
            if member.projections:
                save_file(member.projections, fresh / name / "projections.safetensors")
        _write_manifest(fresh, step, scores)
    for old in _dropped(folder, retention):
        remove_folder(old)
    return place


def place_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of the state before `step` is."""
    return folder / f"step-{step:08d}"


def step_of(place: Path) -> int:
    """The step that the checkpoint at `place` goes on with."""
    return int(place.name.removeprefix("step-"))


def newest(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that verifies; one that does not is set aside as `NAME.damaged`, and named."""
    for place in reversed(_steps(folder)):
        damage = verify(place)
        if damage is None:
            return place
        aside = place.with_name(place.name + ".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        place.rename(aside)
        print(f"checkpoint {place.name}: {damage}; kept as {aside.name}, looking for an older one", file=sys.stderr)
    return None


def verify(place: Path) -> str | None:
    """What is wrong with the checkpoint at `place`, in a few words, or None."""
    manifest = _read_manifest(place)
    if manifest is None:
        return "manifest.json is missing or damaged"
    if manifest["step"] != step_of(place):
        return f"it is of step {manifest['step']}"
    for name, entry in manifest["files"].items():
        file = place / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"] or sha256(file) != entry["sha256"]:
            return f"{name} differs from its checksum"
    return None


def load(place: Path, members: Mapping[str, Trained]) -> int:
    """Restores `members` in place from a verified checkpoint, bit for bit; returns the step to do next."""
    manifest = _read_manifest(place)
    assert manifest is not None, "load takes a checkpoint that verifies"
    held = sorted({name.split("/")[0] for name in manifest["files"]})
    if held != sorted(members):
        raise UserError(f"{place}: the checkpoint holds {', '.join(held)}, but the run trains {', '.join(members)}")
    for name, member in members.items():
        try:
            _restore(place / name / "model.safetensors", distinct(member.model))
            _restore(place / name / "projections.safetensors", member.projections.state_dict(keep_vars=True))
            _restore_moments(member, load_file(place / name / "optimizer.safetensors"))
        except SafetensorError as error:
            raise UserError(f"{place / name} holds what is no tensor file ({error}); remove the checkpoint") from None
    return manifest["step"]


# ---- files -------------------------------------------------------------------------------------


def _steps(folder: Path) -> list[Path]:
    return sorted(place for place in folder.glob("step-*") if place.is_dir() and place.name[5:].isdecimal())


def _dropped(folder: Path, retention: Retention) -> list[Path]:
    places = _steps(folder)
    kept = set(places[-retention.newest :])
    if retention.every is not None:
        kept |= {place for place in places if step_of(place) % retention.every == 0}
    if retention.best:
        comparable = [place for place in places if step_of(place) > retention.scored_from]
        scored = [(place, (_read_manifest(place) or {}).get("scores") or {}) for place in comparable]
        known = [(name, loss, place) for place, scores in scored for name, loss in scores.items() if loss is not None]
        for name in {name for name, _, _ in known}:
            kept.add(min((loss, place) for other, loss, place in known if other == name)[1])
    return [place for place in places if place not in kept]


def _write_manifest(fresh: Path, step: int, scores: Mapping[str, float] | None) -> None:
    files = sorted(file for file in fresh.rglob("*") if file.is_file())
    entries = {str(file.relative_to(fresh)): {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files}
    content = {"step": step, "scores": without_nan(scores), "files": entries}
    (fresh / "manifest.json").write_text(to_json(content | {"sha256": _digest(content)}, indent=1), encoding="utf-8")


def _read_manifest(place: Path) -> dict[str, Any] | None:
    """The manifest without its own checksum, or None where it is missing or not as it was written."""
    try:
        manifest = json.loads((place / "manifest.json").read_text(encoding="utf-8"))
        is_whole = manifest.pop("sha256") == _digest(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if is_whole else None


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# ---- tensors -----------------------------------------------------------------------------------


@torch.no_grad()
def _restore(file: Path, state: Mapping[str, Tensor]) -> None:
    tensors = load_file(file) if file.exists() else {}
    wrong = [name for name in tensors if name not in state or state[name].shape != tensors[name].shape]
    wrong += [name for name in state if name not in tensors]
    if wrong:
        raise UserError(
            f"{file.parent}: the checkpoint is of a model of another shape ({wrong[0]} does not match); resume with "
            "the configuration that it was made with"
        )
    for name, tensor in state.items():
        tensor.copy_(like(tensors[name], tensor))


def _moments(member: Trained) -> dict[str, Tensor]:
    return {
        f"{moment}/{name}": tensor
        for name, parameter in member.parameters().items()
        for moment, tensor in member.optimizer.state.get(parameter, {}).items()
    }


def _restore_moments(member: Trained, moments: Mapping[str, Tensor]) -> None:
    parameters = member.parameters()
    member.optimizer.state.clear()
    for key, tensor in moments.items():
        moment, name = key.split("/", 1)
        parameter = parameters[name]
        # A moment is as its parameter; the step count is a number beside it, since the optimizers here are fused.
        is_moment = tensor.shape == parameter.shape
        member.optimizer.state[parameter][moment] = (
            like(tensor, parameter) if is_moment else tensor.to(parameter.device)
        )
