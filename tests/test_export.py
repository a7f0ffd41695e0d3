"""Exports: what stands in the folder is what the run made, and what is said of it was measured."""

import json
import os
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForMaskedLM, AutoTokenizer

from codistill import export
from codistill.cli import main
from codistill.errors import MachineError, UserError
from codistill.export import export_member
from codistill.export import onnx as onnx_room
from codistill.loading import load, read_run
from codistill.model_card import model_card
from codistill.train import Stopped, train
from runs import small_run, with_teachers

MISSING = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"{MISSING}: pip install 'codistill[onnx]' brings them")


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory) -> Path:
    """A pair of which the large one has a local layer after its global one."""
    return train(small_run("ctcd", text, "steps=10"), tmp_path_factory.mktemp("export") / "pair")


@pytest.fixture(scope="module")
def onnx(finished, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "large"
    export_member(finished, "large", format="onnx", out=out)
    return out


@pytest.fixture(scope="module")
def int8(finished, onnx, tmp_path_factory) -> Path:
    """Made from the file of the fixture above, because a conversion takes half of these tests' time."""

    def converted(source, fresh):
        shutil.copytree(onnx, fresh, dirs_exist_ok=True)
        return json.loads((onnx / "export.json").read_text())["parity"]

    out = tmp_path_factory.mktemp("int8") / "large"
    with mock.patch.object(export, "convert", converted):
        export_member(finished, "large", format="int8", out=out)
    return out


def pytorch_logits(folder: Path, ids: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return AutoModelForMaskedLM.from_pretrained(folder).eval()(input_ids=ids, attention_mask=mask).logits.numpy()


def card_of(folder, member: str) -> str:
    return (folder / "members" / member / "README.md").read_text()


def onnx_logits(file: Path, ids: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]


def test_a_hugging_face_folder_is_the_member_with_its_card(finished, tmp_path):
    facts = export_member(finished, "small", format="hf", out=tmp_path / "small")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "small")
    inputs = tokenizer("the cat sat on a [MASK]", return_tensors="pt")
    ours, theirs = (
        pytorch_logits(folder, inputs["input_ids"], inputs["attention_mask"])
        for folder in (finished / "members" / "small", tmp_path / "small")
    )
    assert np.array_equal(ours, theirs)
    assert (tmp_path / "small" / "README.md").read_text() == card_of(finished, "small")
    assert json.loads((tmp_path / "small" / "export.json").read_text()) == facts
    assert facts["bytes"] == (finished / "members" / "small" / "model.safetensors").stat().st_size


def test_the_card_says_what_the_run_folder_says(text, teacher, tmp_path):
    out = train(with_teachers("inherit", text, teacher, "steps=4", "seed=3"), tmp_path / "run")
    card = card_of(out, "large")
    results = json.loads((out / "results.json").read_text())
    front = yaml.safe_load(card.split("---")[1])
    assert front["pipeline_tag"] == "fill-mask"
    assert f"| loss (nats) | {results['members']['large']['loss']:.4f} |" in card
    assert f"On {results['held_out']['rows']} predicted tokens" in card
    assert "One run, seed 3, so without an error bar" in card
    assert '| `weak`, begun as `large`; frozen | forward_kl | 2.0 | `{"linear": [1.0, 0.0, ' in card
    assert "train: `prose.txt`: 1 documents" in card
    assert str(tmp_path) not in card
    assert str(text.parent) not in card
    assert str(teacher.parent) not in card
    assert "taken as it was and not trained" in card_of(out, "weak")


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("corpus/*", "corpus/*"),
        ("/home/me/secret/corpus/*.txt", "corpus/*.txt"),
        ("/home/me/secret/corpus/**/[0-9]*.jsonl.gz", "corpus/**/[0-9]*.jsonl.gz"),
        ("/home/me/secret/shard-*.parquet", "shard-*.parquet"),
        ("/home/me/secret/corpus/", "corpus"),
        ("/home/me/secret/prose.txt", "prose.txt"),
        ("*", "*"),
        ("builtin:python/train", "builtin:python/train"),
    ],
)
def test_a_card_names_the_end_of_a_source_that_has_a_name_and_no_more(source, shown, finished):
    run = load(read_run(finished / "run.yaml"))
    run = replace(run, data=replace(run.data, train=[source], validation=[source]))
    card = model_card(run, json.loads((finished / "results.json").read_text()), "large")
    assert f"- train: `{shown}`: 1 documents" in card
    recipe = yaml.safe_load(card.split("```yaml")[1].split("```")[0])
    assert recipe["data"]["train"] == recipe["data"]["validation"] == [shown]
    assert "/home" not in card
    assert "secret" not in card


def test_a_card_names_the_twin(text, tmp_path):
    out = train(small_run("quickstart", text, "steps=2"), tmp_path / "run")
    members = json.loads((out / "results.json").read_text())["members"]
    line = "| loss of `{}`, the same model, taught by {} | {:.4f} |"
    assert line.format("large-alone", "nobody", members["large-alone"]["loss"]) in card_of(out, "large")
    assert line.format("large", "small", members["large"]["loss"]) in card_of(out, "large-alone")


@needs_onnx
@pytest.mark.parametrize(("sequences", "length"), [(1, 5), (4, 333)])
def test_onnx_agrees_with_pytorch_at_shapes_that_were_not_checked_when_it_was_made(sequences, length, finished, onnx):
    ids = torch.randint(40, (sequences, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    ours = pytorch_logits(finished / "members" / "large", ids, mask)
    theirs = onnx_logits(onnx / "model.onnx", ids, mask)
    assert np.abs(ours - theirs)[mask.numpy() == 1].max() < 1e-4
    assert np.abs(ours).max() > 0.1


@needs_onnx
def test_an_onnx_folder_says_what_was_checked(onnx):
    facts = json.loads((onnx / "export.json").read_text())
    assert facts["parity"]["largest_difference"] <= facts["parity"]["tolerance"] == 1e-4
    assert facts["parity"]["shapes"] == [[2, 9], [3, 200]]
    assert {file.name for file in onnx.iterdir()} >= {"model.onnx", "config.json", "tokenizer.json", "README.md"}
    assert not list(onnx.glob("*.safetensors"))
    assert "at 2 × 9 and 3 × 200 tokens" in (onnx / "README.md").read_text()


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "modernbert", "llama"])
def test_weights_of_any_size_are_converted(family, text, tmp_path, monkeypatch):
    """As one file, or, where a protobuf would be too small, with a file beside it."""
    recipe = "standalone-clm" if family == "llama" else "standalone"
    run = train(small_run(recipe, text, "steps=1", f"members.large.model.family={family}"), tmp_path / "run")
    monkeypatch.setattr(onnx_room, "_INLINE_BYTES", 1000)
    facts = export_member(run, "large", format="int8", out=tmp_path / "large")
    assert facts["parity_before"]["largest_difference"] < 1e-4
    assert facts["held_out"]["int8"]["rows"] == facts["held_out"]["float32"]["rows"]
    ids = torch.arange(20).reshape(2, 10)
    assert onnx_logits(tmp_path / "large" / "model.onnx", ids, torch.ones_like(ids)).shape[:2] == (2, 10)


@needs_onnx
def test_int8_reports_size_and_what_it_costs(finished, int8, capsys):
    facts = json.loads((int8 / "export.json").read_text())
    assert facts["bytes"]["int8"] == (int8 / "model.onnx").stat().st_size
    assert facts["bytes"]["int8"] < facts["bytes"]["float32"]
    held_out = facts["held_out"]
    results = json.loads((finished / "results.json").read_text())
    assert held_out["float32"]["rows"] == results["held_out"]["rows"]
    assert held_out["float32"]["loss"] == pytest.approx(results["members"]["large"]["loss"], abs=0.02)  # bfloat16 there
    assert held_out["accuracy_drop"] == held_out["float32"]["accuracy"] - held_out["int8"]["accuracy"]
    assert held_out["loss_rise"] == held_out["int8"]["loss"] - held_out["float32"]["loss"]
    assert 0 < abs(held_out["loss_rise"]) < 0.1
    card = (int8 / "README.md").read_text()
    assert f"int8: {facts['bytes']['int8']:,} bytes against {facts['bytes']['float32']:,} bytes" in card


@needs_onnx
def test_int8_without_its_text_says_that_nothing_was_measured(text, tmp_path, finished, onnx, monkeypatch):
    def copied(source, fresh):
        return {"copied to": str(shutil.copytree(onnx, fresh, dirs_exist_ok=True))}

    moved = tmp_path / "moved"
    shutil.copytree(finished, moved)
    settings = (moved / "run.yaml").read_text()
    (moved / "run.yaml").write_text(settings.replace(str(text), str(tmp_path / "nowhere.txt")))
    monkeypatch.setattr(
        export, "convert", lambda source, fresh: {"copy": str(shutil.copytree(onnx, fresh, dirs_exist_ok=True))}
    )
    monkeypatch.setattr(export, "model_card", lambda run, results, member: "")
    monkeypatch.setattr(export, "_section", lambda facts: "")
    facts = export_member(moved, "large", format="int8", out=tmp_path / "out")
    assert "nowhere.txt" in facts["held_out"]["not_measured"]
    (tmp_path / "other.txt").write_text(text.read_text() * 2)
    (moved / "run.yaml").write_text(settings.replace(str(text), str(tmp_path / "other.txt")))
    facts = export_member(moved, "large", format="int8", out=tmp_path / "out-2")
    assert facts["held_out"] == {"not_measured": "data.validation: the text is not what the run was scored on"}
    assert "was not measured (data.validation" in export.describe(facts)


# ---- what is wrong -----------------------------------------------------------------------------


@needs_onnx
def test_a_file_whose_logits_disagree_is_not_left(finished, onnx, tmp_path, monkeypatch):
    real = onnx_room._run
    monkeypatch.setattr(
        onnx_room.torch.onnx, "export", lambda model, args, file, **_: shutil.copy(onnx / "model.onnx", file)
    )
    monkeypatch.setattr(onnx_room, "_run", lambda *inputs: real(*inputs) + np.float32(2e-4))
    with pytest.raises(MachineError, match=r"logits differ from PyTorch's by 2\.0e-04, more than 1e-04"):
        export_member(finished, "large", format="onnx", out=tmp_path / "out")
    monkeypatch.setattr(onnx_room, "_run", lambda *inputs: real(*inputs) * np.float32("nan"))
    with pytest.raises(MachineError, match="differ from PyTorch's by nan"):
        export_member(finished, "large", format="onnx", out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def refused(message: str, folder: Path, member: str, **options) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        export_member(folder, member, **options)
    assert "\n" not in str(refusal.value)


def test_what_cannot_be_exported_is_refused(finished, text, tmp_path, monkeypatch):
    refused("holds no run; give the folder of a finished run", tmp_path, "large", format="hf", out=tmp_path / "out")
    with pytest.raises(Stopped):
        train(small_run("standalone", text, "steps=4"), tmp_path / "run", stop_at=2)
    refused("is not finished", tmp_path / "run", "large", format="hf", out=tmp_path / "out")
    refused(
        "--member big: .* has no such member; there are large, small",
        finished,
        "big",
        format="hf",
        out=tmp_path / "out",
    )
    (tmp_path / "mine").mkdir()
    refused("--out: .*mine exists; give a folder that does not", finished, "large", format="hf", out=tmp_path / "mine")
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    refused("codistill's extra `onnx` brings", finished, "large", format="onnx", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "mine").iterdir())


def fake_hub(monkeypatch, raises: Exception | None = None) -> list:
    import huggingface_hub

    asked = []

    def upload_folder(**settings):
        if raises:
            raise raises
        asked.append((settings["repo_id"], sorted(file.name for file in Path(settings["folder_path"]).iterdir())))

    create_repo = lambda repository, **settings: asked.append((repository, settings))  # noqa: E731
    hub = SimpleNamespace(create_repo=create_repo, upload_folder=upload_folder)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    return asked


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "members" / "small" / "model.safetensors").unlink(), "model.safetensors cannot be read"),
        (lambda run: os.truncate(run / "members" / "small" / "model.safetensors", 1000), "safetensors cannot be read"),
        (lambda run: (run / "results.json").unlink(), "no results.json that tells of 'small'; `codistill train"),
        (lambda run: (run / "results.json").write_text("{"), "no results.json that tells of 'small'"),
        (lambda run: (run / "results.json").write_text("{}"), "no results.json that tells of 'small'"),
    ],
)
def test_a_run_that_is_not_whole_is_refused(spoil, message, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    spoil(tmp_path / "run")
    with pytest.raises(UserError, match=message):
        export_member(tmp_path / "run", "small", format="hf", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_goes_to_the_hub_on_request_only(finished, tmp_path, monkeypatch, capsys):
    asked = fake_hub(monkeypatch)
    main(["export", str(finished), "--member", "small", "--out", str(tmp_path / "quiet")])
    assert asked == []
    assert "a Hugging Face folder, " in capsys.readouterr().out
    main(["export", str(finished), "--member", "small", "--out", str(tmp_path / "small"), "--push", "me/small"])
    made, uploaded = asked
    assert made == ("me/small", {"private": True, "exist_ok": True})
    assert uploaded == ("me/small", sorted(file.name for file in (tmp_path / "small").iterdir()))


def test_a_push_that_fails_leaves_the_folder(finished, tmp_path, monkeypatch):
    fake_hub(monkeypatch, ConnectionError("no\nroute"))
    with pytest.raises(MachineError, match=r"--push: me/small was not uploaded: no route; .*small is whole"):
        export_member(finished, "small", format="hf", out=tmp_path / "small", push="me/small")
    assert (tmp_path / "small" / "README.md").exists()
