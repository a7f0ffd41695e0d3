"""What has changed since a run was made is named when it is resumed, and refused or accepted on request."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from codistill.build import build
from codistill.data.tokenizers import train_tokenizer
from codistill.loading import load, override, read_run, to_dict, to_yaml
from codistill.train import Stopped, train
from runs import refused, small_run, with_teachers


def test_changed_text_is_noticed(text, tmp_path, capsys):
    file = tmp_path / "prose.txt"
    file.write_text(text.read_text())
    train_tokenizer("wordpiece", 300, [text.read_text()]).save_pretrained(tmp_path / "tokenizer")
    run = small_run("standalone", file, "steps=4", f"data.tokenizer={tmp_path / 'tokenizer'}")
    with pytest.raises(Stopped):
        train(run, tmp_path / "run", stop_at=2)
    file.write_text(text.read_text() + " and more")
    refused("provenance.data: the run was made with train .*with --accept-changes", run, tmp_path / "run", resume=True)
    recorded = load(read_run(tmp_path / "run" / "run.yaml"))
    refused("provenance.data: the run was made with train .*removing `provenance`", recorded, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    out = train(run, tmp_path / "run", resume=True, accept_changes=True)
    assert (out / "run.before-0.yaml").exists()
    [part] = load(read_run(out / "run.yaml")).provenance["changed"]
    was = recorded.provenance["data"]["train"]
    assert (part["from_step"], part["was"]) == (2, {})
    assert part["inputs"]["data.train.identity"] == was["identity"]
    assert f"`data.train.identity` (was {was['identity']})" in (out / "members" / "large" / "README.md").read_text()
    assert f"changed from step 3 on: data.train.identity (was {was['identity']})" in capsys.readouterr().err
    train(load(read_run(out / "run.yaml")), tmp_path / "again")
    assert "changed its settings on the way" in capsys.readouterr().err


def test_a_tokenizer_that_is_trained_on_other_text_is_never_put_under_trained_models(text, tmp_path):
    """Its ids would mean other tokens. The run's folder keeps the one that its models know."""
    file = tmp_path / "prose.txt"
    file.write_text(text.read_text())
    run = small_run("standalone", file, "steps=4")
    with pytest.raises(Stopped):
        train(run, tmp_path / "run", stop_at=2)
    made_with = load(read_run(tmp_path / "run" / "run.yaml")).provenance["tokenizer"]
    file.write_text(text.read_text() + " quite other words zebra quagga xylophone" * 50)
    message = r"data.tokenizer: the models in .* --set data\.tokenizer=.*run/tokenizer$"
    for accept in (False, True):
        refused(message, run, tmp_path / "run", resume=True, accept_changes=accept)
    kept = load(override(to_dict(run), [f"data.tokenizer={tmp_path / 'run' / 'tokenizer'}"]))
    out = train(kept, tmp_path / "run", resume=True, accept_changes=True)
    assert load(read_run(out / "run.yaml")).provenance["tokenizer"] == made_with


def test_all_changes_are_named(text, tmp_path):
    run = small_run("standalone", text, "steps=4")
    with pytest.raises(Stopped):
        train(run, tmp_path / "run", stop_at=2)
    other = load(
        override(
            to_dict(run), ["seed=7", "batch.sequences=16", "log.every=1", "members.large.weight_decay=0.5", "steps=5"]
        )
    )
    named = (
        "batch.sequences was 8 and is now 16; log.every was 5 and is now 1; members.large.weight_decay was .* now 0.5"
    )
    refused(f"{named}; 2 more: seed, steps;", other, tmp_path / "run", resume=True)


def test_losses_on_other_validation_text_are_not_compared(text, tmp_path):
    """Other text, whose loss is higher: the best step is one of those scored on it, and none of them is stale."""
    hard = tmp_path / "hard.txt"
    hard.write_text(" ".join(reversed(text.read_text().split())) * 2)
    tokenizer = tmp_path / "tokenizer"
    train_tokenizer("wordpiece", 300, [text.read_text()]).save_pretrained(tokenizer)
    settings = ["evaluate.every=2", "checkpoint={every: 2, keep: 1, keep_best: true}", f"data.tokenizer={tokenizer}"]
    run = small_run("standalone", text, "steps=6", *settings)
    with pytest.raises(Stopped):
        train(run, tmp_path / "run", stop_at=4)
    file = tmp_path / "run" / "metrics.jsonl"
    lowest = {"held_out": {"large": {"loss": 0.1, "accuracy": 0.9}}}  # as if the first text were much the easier one
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(line | lowest if "held_out" in line else line) + "\n" for line in lines))
    changes = [f"data.validation=[{hard}]", "stop_early={patience: 1}", "steps=8"]
    train(load(override(to_dict(run), changes)), tmp_path / "run", resume=True, accept_changes=True)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["members"]["large"]["best"]["step"] > 4
    assert results["members"]["large"]["best"]["loss"] > 0.1
    assert results["steps"] == 8
    kept = {place.name for place in (tmp_path / "run" / "checkpoints").iterdir()}
    assert "step-00000004" not in kept


def test_another_number_of_sequences_goes_on_with_the_next_one(text, tmp_path, monkeypatch):
    """Every row comes once an epoch, also where the batches become larger on the way."""
    loop = sys.modules["codistill.train"]  # the package has a function of that name
    seen: list[tuple[int, ...]] = []
    real = loop.prefetched
    monkeypatch.setattr(loop, "prefetched", lambda *args, **kwargs: _noted(seen, real(*args, **kwargs)))
    run = small_run("standalone", text, "steps=4")
    rows = build(replace(run, precision="float32"), torch.device("cpu")).batches.num_rows
    larger = load(override(to_dict(run), ["batch.sequences=16", f"steps={2 + (rows - 16) // 16}"]))
    with pytest.raises(Stopped):
        train(run, tmp_path / "run", stop_at=2)
    del seen[2:]  # what was made ahead and not used
    out = train(larger, tmp_path / "run", resume=True, accept_changes=True)
    ids = [number for batch in seen for number in batch]
    assert len(ids) == len(set(ids)) == 16 + (rows - 16) // 16 * 16 > 16
    assert json.loads((out / "results.json").read_text())["passes"] == round(len(ids) / rows, 4)


def _noted(seen, batches):
    for micro_batches in batches:
        seen.append(tuple(number for batch in micro_batches for number in batch.sample_ids))
        yield micro_batches


def test_special_tokens_that_have_changed_are_noticed(text, tmp_path):
    """The vocabulary and its rules are the same, so the prepared text is too, but rows would begin otherwise."""
    folder = tmp_path / "tokenizer"
    train_tokenizer("wordpiece", 300, [text.read_text()]).save_pretrained(folder)
    run = small_run("standalone", text, "steps=4", f"data.tokenizer={folder}")
    with pytest.raises(Stopped):
        train(run, tmp_path / "run", stop_at=2)
    changed = AutoTokenizer.from_pretrained(folder)
    changed.cls_token = None
    changed.save_pretrained(folder)
    refused("provenance.special_tokens: .* start 2, but now it is None", run, tmp_path / "run", resume=True)


def test_a_changed_configuration_of_a_pre_trained_member_is_noticed_and_the_same_model_saved_again_is_not(
    text, teacher, tmp_path
):
    place = shutil.copytree(teacher, tmp_path / "teacher")
    run = with_teachers("kd", text, place, "steps=4")
    with pytest.raises(Stopped):
        train(run, tmp_path / "run", stop_at=2)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"norm_eps": 0.5}))
    message = "provenance.configurations: the run was made with teacher '.*but now it is"
    refused(message, run, tmp_path / "run", resume=True)
    refused(message, load(read_run(tmp_path / "run" / "run.yaml")), tmp_path / "other")
    (place / "config.json").write_text(json.dumps(config | {"transformers_version": "4.0.0", "_name_or_path": "/a"}))
    AutoModelForMaskedLM.from_pretrained(place, dtype=torch.float32).save_pretrained(place)
    train(run, tmp_path / "run", resume=True)


def test_a_run_from_before_configurations_were_recorded_goes_on(text, teacher, tmp_path):
    run = with_teachers("kd", text, teacher, "steps=4")
    with pytest.raises(Stopped):
        train(run, tmp_path / "run", stop_at=2)
    file = tmp_path / "run" / "run.yaml"
    tree = read_run(file)
    del tree["provenance"]["configurations"]
    file.write_text(to_yaml(load(tree)))
    train(run, tmp_path / "run", resume=True)


def test_a_changed_setting_is_refused_or_accepted_on_request(text, tmp_path):
    run = small_run("standalone", text, "steps=4")
    with pytest.raises(Stopped):
        train(run, tmp_path / "run", stop_at=2)
    changed = replace(run, seed=7)
    refused("seed was 0 and is now 7; .*--accept-changes", changed, tmp_path / "run", resume=True)
    assert load(read_run(train(changed, tmp_path / "run", resume=True, accept_changes=True) / "run.yaml")).seed == 7


def test_other_versions_are_noticed_on_resumption(text, tmp_path):
    run = small_run("standalone", text, "steps=4")
    with pytest.raises(Stopped):
        train(run, tmp_path / "run", stop_at=2)
    file = tmp_path / "run" / "run.yaml"
    file.write_text(file.read_text().replace(f"torch: {torch.__version__}", "torch: 1.0.0"))
    refused("provenance.versions: the run was made with torch '1.0.0', but now", run, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["members.extra={model: {layers: 1, width: 32}}"],
            "holds large, but the run trains large, extra",
        ),
        (["members.large.model.layers=3"], "the checkpoint is of a model of another shape"),
        (["data.tokenizer='train:bpe:300'"], "have learned the tokens of another tokenizer"),
        (["steps=1"], "steps: 1 came in, but .* is at step 2; --fresh starts it over"),
    ],
)
def test_what_a_checkpoint_cannot_become_is_refused_and_leaves_the_run_as_it_was(changes, message, text, tmp_path):
    run = small_run("standalone", text, "steps=4", "members.large.model.layers=2")
    with pytest.raises(Stopped):
        train(run, tmp_path / "run", stop_at=2)
    before = (tmp_path / "run" / "run.yaml").read_text()
    changed = load(override(to_dict(run), changes))
    refused("--accept-changes", changed, tmp_path / "run", resume=True)
    refused(message, changed, tmp_path / "run", resume=True, accept_changes=True)
    assert (tmp_path / "run" / "run.yaml").read_text() == before
    train(run, tmp_path / "run", resume=True)


def test_another_precision_is_noticed(text, tmp_path):
    run = small_run("standalone", text, "steps=4", "precision=float32")
    with pytest.raises(Stopped):
        train(run, tmp_path / "run", stop_at=2)
    other = replace(run, precision="bfloat16")
    refused("precision was 'float32' and is now 'bfloat16'", other, tmp_path / "run", resume=True)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over_in_silence(text, tmp_path, capsys):
    run = small_run("standalone", text, "steps=4")
    with pytest.raises(Stopped):
        train(run, tmp_path / "run", stop_at=2)
    for manifest in (tmp_path / "run" / "checkpoints").glob("*/manifest.json"):
        manifest.write_text("{}")
    refused("none of its checkpoints verifies; --fresh starts the run over", run, tmp_path / "run", resume=True)
    assert "step-00000002: manifest.json is missing or damaged" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["gpu", "cuda:9", "mps"])
def test_a_device_that_is_not_there_is_refused(device, text, tmp_path):
    refused(f"--device {device}: ", small_run("standalone", text), tmp_path / "run", device=device)


def test_the_best_and_every_nth_checkpoint_of_a_run_stay(text, tmp_path):
    keep = "checkpoint={every: 2, keep: 1, keep_every: 6, keep_best: true}"
    out = train(small_run("standalone", text, "steps=14", keep, "evaluate.every=4"), tmp_path / "run")
    steps = {int(place.name[5:]) for place in (out / "checkpoints").iterdir()}
    scores = {
        line["step"]: line["held_out"]["large"]["loss"]
        for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        if "held_out" in line
    }
    assert steps == {6, 12, 14, min(scores, key=lambda step: scores[step])}


def test_what_a_killed_process_was_writing_goes_when_the_run_goes_on(text, tmp_path):
    run = small_run("standalone", text, "steps=4")
    with pytest.raises(Stopped):
        train(run, tmp_path / "run", stop_at=2)
    for left in (".members.partial", ".members.removed"):
        (tmp_path / "run" / left / "large").mkdir(parents=True)
    (tmp_path / "run" / ".results.json.0a1b2c3d.partial").write_text("{")
    (tmp_path / "run" / "mine.partial").write_text("a note")
    out = train(run, tmp_path / "run", resume=True)
    assert [file.name for file in out.iterdir() if file.suffix in (".partial", ".removed")] == ["mine.partial"]
