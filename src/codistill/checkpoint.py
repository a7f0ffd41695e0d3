"""Checkpoints: atomic, verified, exact. A checkpoint is parameters, optimizer moments and one integer, the step.

    checkpoints/step-00000100/
        large/config.json, model.safetensors     loads with `from_pretrained`
        large/optimizer.safetensors              one tensor per (moment, parameter)
        manifest.json                            step, and the size and SHA-256 of every file; written last

A folder is written beside its place, flushed, and renamed; nothing in it is ever unpickled.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer
from transformers import PreTrainedModel

from codistill.errors import MachineError, UserError


class Trained(NamedTuple):
    """What a checkpoint keeps of a member."""

    model: PreTrainedModel
    optimizer: Optimizer


def save(folder: Path, step: int, members: Mapping[str, Trained], *, keep: int) -> Path:
    """Writes `folder`/step-… for the state before step `step`, and drops all but the newest `keep`."""
    place = folder / f"step-{step:08d}"
    with atomic_folder(place) as fresh:
        for name, member in members.items():
            member.model.save_pretrained(fresh / name)
            moments = {k: v.contiguous() for k, v in _moments(member).items()}
            save_file(moments, fresh / name / "optimizer.safetensors")
        _write_manifest(fresh, step)
    for old in _steps(folder)[:-keep]:
        shutil.rmtree(old)
    return place


def newest(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that verifies; one that does not is set aside as `NAME.damaged`."""
    for place in reversed(_steps(folder)):
        damage = verify(place)
        if damage is None:
            return place
        aside = place.with_name(place.name + ".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        place.rename(aside)
        print(f"checkpoint {place.name} is damaged ({damage}); kept as {aside.name}, using the one before")
    return None


def verify(place: Path) -> str | None:
    """What is wrong with the checkpoint at `place`, in a few words, or None."""
    try:
        manifest = json.loads((place / "manifest.json").read_text())
        for name, entry in manifest["files"].items():
            file = place / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["bytes"] or sha256(file) != entry["sha256"]:
                return f"{name} differs from its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is missing or unreadable"
    return None


def load(place: Path, members: Mapping[str, Trained]) -> int:
    """Restores `members` in place from a verified checkpoint, bit for bit; returns the step to do next."""
    manifest = json.loads((place / "manifest.json").read_text())
    held = sorted({name.split("/")[0] for name in manifest["files"]})
    if held != sorted(members):
        raise UserError(f"{place}: the checkpoint holds {', '.join(held)}, but the run trains {', '.join(members)}")
    for name, member in members.items():
        _restore_parameters(member.model, load_file(place / name / "model.safetensors"))
        _restore_moments(member, load_file(place / name / "optimizer.safetensors"))
    return manifest["step"]


@contextmanager
def atomic_folder(place: Path) -> Iterator[Path]:
    """A fresh folder beside `place` that takes its name once the block has ended well, and vanishes if it has not."""
    fresh = place.with_name(f".{place.name}.{os.getpid()}.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir(parents=True)
        yield fresh
        for file in fresh.rglob("*"):
            _flush(file)
        if place.exists():
            shutil.rmtree(place)
        fresh.rename(place)
        _flush(place.parent)
    except OSError as error:
        raise machine_error(error, place) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def machine_error(error: OSError, place: Path) -> MachineError:
    """One line for a failure of the disk, with the remedy."""
    remedy = "free some space and resume" if error.errno == errno.ENOSPC else "nothing there was changed"
    return MachineError(f"{place} could not be written: {error.strerror or error}; {remedy}")


# ---- files -------------------------------------------------------------------------------------


def _steps(folder: Path) -> list[Path]:
    return sorted(place for place in folder.glob("step-*") if place.is_dir() and place.name[5:].isdecimal())


def _write_manifest(fresh: Path, step: int) -> None:
    files = sorted(file for file in fresh.rglob("*") if file.is_file())
    entries = {str(file.relative_to(fresh)): {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files}
    (fresh / "manifest.json").write_text(json.dumps({"step": step, "files": entries}, indent=1))


def sha256(file: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _restore_parameters(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> None:
    # Tied tensors are stored once, so the file may name fewer tensors than the model does, but never fewer storages.
    report = model.load_state_dict(tensors, strict=False)
    state = model.state_dict()
    restored = {state[name].data_ptr() for name in tensors if name in state}
    lost = [name for name in report.missing_keys if state[name].data_ptr() not in restored]
    if lost or report.unexpected_keys:
        raise UserError(f"the checkpoint is of another model: {(lost + report.unexpected_keys)[0]} does not match")


# ---- optimizer moments -------------------------------------------------------------------------


def _moments(member: Trained) -> dict[str, torch.Tensor]:
    return {
        f"{moment}/{name}": tensor
        for name, parameter in member.model.named_parameters()
        for moment, tensor in member.optimizer.state.get(parameter, {}).items()
    }


def _restore_moments(member: Trained, moments: Mapping[str, torch.Tensor]) -> None:
    parameters = dict(member.model.named_parameters())
    member.optimizer.state.clear()
    for key, tensor in moments.items():
        moment, name = key.split("/", 1)
        # AdamW keeps its step count where it wants it: beside the parameter when fused, else on the host.
        member.optimizer.state[parameters[name]][moment] = tensor.to(parameters[name].device)
