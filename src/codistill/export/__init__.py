"""A member of a finished run as a folder for other people's tools: Hugging Face, ONNX, ONNX with int8 weights."""

import json
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from codistill.data.saved_tokenizer import tokenizer_to_save
from codistill.data.tokenizers import load_tokenizer
from codistill.errors import MachineError, UserError, one_line
from codistill.export.onnx import compare, convert, quantise, size
from codistill.files import atomic_folder, to_json
from codistill.folders import member_of
from codistill.loading import load, read_run
from codistill.model_card import model_card

Format = Literal["hf", "onnx", "int8"]
_LIBRARIES = ("onnx", "onnxscript", "onnxruntime")


def export_member(folder: Path, member: str, *, format: Format, out: Path, push: str | None = None) -> dict[str, Any]:
    """Writes `member` of the finished run in `folder` to the new folder `out`; returns what `out`/export.json holds.

    `hf`: weights, configuration and tokenizer. `onnx`: `model.onnx`, any batch and length, whose logits agree with
    PyTorch's to 1e-4 at two shapes. `int8`: the same with int8 weights, its size and its top-1 accuracy beside
    float32's. All with a tokenizer and a model card. `push`: a hub repository to upload to, made private if it is new.
    UserError for a run, a member or a library that is not there and for an `out` that is; MachineError where the logits
    disagree, in which case nothing is left.
    """
    source = member_of(folder, member)
    if out.exists():
        raise UserError(f"--out: {out} exists; give a folder that does not")
    if format != "hf":
        _check_installed()
    card = _card(folder, member)  # before anything is made: it asks for the run's results
    with atomic_folder(out) as fresh:
        facts = {"format": format, "member": member, **_WRITE[format](folder, source, fresh)}
        _open_prompts(folder, fresh)
        (fresh / "export.json").write_text(to_json(facts, indent=1) + "\n", encoding="utf-8")
        (fresh / "README.md").write_text(card + _section(facts), encoding="utf-8")
    if push:
        _upload(out, push)
    return facts


def _open_prompts(folder: Path, fresh: Path) -> None:
    """Has the tokenizer of a causal member leave prompts open; runs of earlier versions saved it as they trained."""
    if load(read_run(folder / "run.yaml")).objective.name == "clm":
        tokenizer_to_save(load_tokenizer(fresh), is_causal=True).save_pretrained(fresh)


def _card(folder: Path, member: str) -> str:
    """The model card; UserError where the run's results do not tell of the member."""
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        results["members"][member]
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(
            f"{folder}: no results.json that tells of {member!r}; `codistill train {folder / 'run.yaml'} --resume` "
            "ends the run and writes it"
        ) from None
    return model_card(load(read_run(folder / "run.yaml")), results, member)


def _check_installed() -> None:
    missing = [name for name in _LIBRARIES if find_spec(name) is None]
    if missing:
        raise UserError(
            f"--format: {' and '.join(missing)} not installed; codistill's extra `onnx` brings it (docs/install.md)"
        )


def _upload(folder: Path, repository: str) -> None:
    from huggingface_hub import HfApi

    try:
        hub = HfApi()
        hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(folder_path=str(folder), repo_id=repository, commit_message="Upload with codistill")
    except Exception as error:  # the hub's client has many kinds of errors, and its network library more
        words = one_line(error)
        raise MachineError(f"--push: {repository} was not uploaded: {words}; {folder} is whole") from error


# ---- the formats -------------------------------------------------------------------------------


def _write_hf(folder: Path, source: Path, fresh: Path) -> dict[str, Any]:
    for weights in [*source.glob("*.safetensors")] or [source / "model.safetensors"]:
        try:
            with safe_open(weights, framework="pt"):  # a copy would not notice that it is cut short
                continue
        except (SafetensorError, OSError) as error:
            again = f"`codistill train {folder / 'run.yaml'} --resume` writes it again"
            raise UserError(f"{weights} cannot be read: {one_line(error)}; {again}") from None
    shutil.copytree(source, fresh, dirs_exist_ok=True)
    return {"bytes": sum(file.stat().st_size for file in fresh.glob("*.safetensors"))}


def _write_onnx(folder: Path, source: Path, fresh: Path) -> dict[str, Any]:
    parity = convert(source, fresh)
    return {"bytes": size(fresh, "model.onnx"), "parity": parity, "versions": _versions()}


def _write_int8(folder: Path, source: Path, fresh: Path) -> dict[str, Any]:
    parity = convert(source, fresh)
    (fresh / "float32").mkdir()
    for file in fresh.glob("model.onnx*"):
        file.rename(fresh / "float32" / file.name)
    quantise(fresh / "float32" / "model.onnx", fresh / "model.onnx")
    sizes = {"float32": size(fresh / "float32", "model.onnx"), "int8": size(fresh, "model.onnx")}
    scores = compare(folder, source, {"float32": fresh / "float32" / "model.onnx", "int8": fresh / "model.onnx"})
    shutil.rmtree(fresh / "float32")
    return {"bytes": sizes, "held_out": scores, "parity_before": parity, "versions": _versions()}


_WRITE: Mapping[str, Callable[[Path, Path, Path], dict[str, Any]]] = {
    "hf": _write_hf,
    "onnx": _write_onnx,
    "int8": _write_int8,
}


def describe(facts: Mapping[str, Any]) -> str:
    """One line about an export: its format and size, and what was measured."""
    if facts["format"] == "int8":
        large, small = (facts["bytes"][kind] / 2**20 for kind in ("float32", "int8"))
        return f"ONNX with int8 weights, {small:.1f} MiB against {large:.1f} in float32. {_drop(facts)}"
    weight = f"{facts['bytes'] / 2**20:.1f} MiB"
    if facts["format"] == "hf":
        return f"a Hugging Face folder, {weight}"
    return f"ONNX, {weight}; logits within {facts['parity']['largest_difference']:.1e} of PyTorch's"


def _section(facts: Mapping[str, Any]) -> str:
    """What the card says of the file's format."""
    if facts["format"] == "hf":
        return ""
    parity = facts.get("parity") or facts["parity_before"]
    shapes = " and ".join(f"{b} × {t}" for b, t in parity["shapes"])
    worst = f"{parity['largest_difference']:.1e}"
    lines = [
        "\n## This file\n",
        "`model.onnx` takes `input_ids` and `attention_mask` (batch × length, int64) and gives `logits`. Before any "
        f"quantisation its logits differ from PyTorch's by at most {worst}, at {shapes} tokens.",
    ]
    if facts["format"] == "int8":
        small, large = (f"{facts['bytes'][kind]:,} bytes" for kind in ("int8", "float32"))
        lines += [f"\nWeights are int8: {small} against {large}. {_drop(facts)}"]
    return "\n".join(lines) + "\n"


def _drop(facts: Mapping[str, Any]) -> str:
    scores = facts["held_out"]
    if "not_measured" in scores:
        return f"What that costs was not measured ({scores['not_measured']})."
    accuracy = f"{scores['int8']['accuracy']:.2%} against {scores['float32']['accuracy']:.2%}"
    return f"Top-1 accuracy on the held-out text: {accuracy}; loss {scores['loss_rise']:+.4f} nats."


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", *_LIBRARIES)}
