"""What has changed since a run was made is named when it is resumed, and refused or accepted on request."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from codistill.data.tokenizers import train_tokenizer
from codistill.loading import load, override, read_run, to_dict, to_yaml
from codistill.train import Stopped, train
from runs import refused, small_run, with_teachers


def test_changed_text_is_noticed(text, tmp_path):
    file = tmp_path / "prose.txt"
    file.write_text(text.read_text())
    run = small_run("standalone", file, "steps=4")
    with pytest.raises(Stopped):
        train(run, tmp_path / "run", stop_at=2)
    file.write_text(text.read_text() + " and more")
    refused("provenance.data: the run was made with train .*with --accept-changes", run, tmp_path / "run", resume=True)
    recorded = load(read_run(tmp_path / "run" / "run.yaml"))
    refused("provenance.data: the run was made with train .*removing `provenance`", recorded, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    out = train(run, tmp_path / "run", resume=True, accept_changes=True)
    assert (out / "run.before-0.yaml").exists()
    assert load(read_run(out / "run.yaml")).provenance != recorded.provenance


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
        (["data.tokenizer='train:bpe:300'"], "the checkpoint is of a model of another shape"),
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
