"""Checkpoints: exact, atomic, verified."""

import hashlib
import json
import pickle
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM

from codistill import checkpoint
from codistill.checkpoint import Retention, Saver, Trained, load, newest, snapshot, verify, write
from codistill.cohort import Cohort, Distillation
from codistill.errors import MachineError, UserError
from codistill.files import atomic_folder
from cohorts import assert_same_bits, member, parameters, run


def cohort() -> Cohort:
    return Cohort([member("large", 2), member("small")], [Distillation("large", "small")])


def trained(built: Cohort) -> dict[str, Trained]:
    return {m.name: Trained(m.predictor.model, m.optimizer) for m in built.trained}


def save(folder, step, members, *, keep=2, scores=None, **retention):
    snapshots = {name: snapshot(member) for name, member in members.items()}
    return write(folder, step, snapshots, Retention(keep, **retention), scores)


def test_a_restored_cohort_goes_on_bit_for_bit(tmp_path):
    straight = run(cohort(), range(6))
    first = run(cohort(), range(3))
    save(tmp_path, 3, trained(first), keep=2)
    second = run(cohort(), range(1))  # another state, all of which the checkpoint must replace
    assert load(newest(tmp_path), trained(second)) == 3
    run(second, range(3, 6))
    for name in ("large", "small"):
        assert_same_bits(parameters(straight, name), parameters(second, name))


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, trained(cohort()), keep=2)
    assert [place.name for place in sorted(tmp_path.iterdir())] == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "step", "empty"])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(tmp_path, damage, capsys):
    built = trained(cohort())
    good, bad = save(tmp_path, 1, built, keep=2), save(tmp_path, 2, built, keep=2)
    file = bad / "large" / "optimizer.safetensors"
    file = bad / "small" / "model.safetensors" if damage == "flip" else file
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[:-8])
    elif damage == "remove":
        file.unlink()
    elif damage == "manifest":
        (bad / "manifest.json").write_text("{")
    elif damage == "step":  # one flipped bit: 2 -> 3
        text = (bad / "manifest.json").read_text()
        assert '"step": 2' in text
        (bad / "manifest.json").write_text(text.replace('"step": 2', '"step": 3'))
    else:
        for inside in [*bad.rglob("*.*")]:
            inside.unlink()
    assert newest(tmp_path) == good
    assert "checkpoint step-00000002: " in capsys.readouterr().err
    assert (tmp_path / "step-00000002.damaged").is_dir()
    assert verify(good) is None


def test_every_nth_and_the_best_stay_too(tmp_path):
    built = trained(cohort())
    large, small = [None, 3.0, 1.0, None, 2.0, 4.0, 5.0, 6.0], [None, 3.0, 4.0, None, 5.0, 6.0, 2.0, 7.0]
    for step, of_both in enumerate(zip(large, small, strict=True)):
        scores = None if of_both[0] is None else dict(zip(("large", "small"), of_both, strict=True))
        save(tmp_path, step, built, keep=1, every=4, best=True, scores=scores)
    assert [int(place.name[5:]) for place in sorted(tmp_path.iterdir())] == [0, 2, 4, 6, 7]


def test_the_saver_writes_what_was_there_when_it_was_asked(tmp_path):
    straight = run(cohort(), range(4))
    first = run(cohort(), range(2))
    saver = Saver(tmp_path, Retention(2))
    saver.save(2, trained(first))
    run(first, range(2, 4))  # goes on while the checkpoint is written
    saver.finish()
    second = cohort()
    load(newest(tmp_path), trained(second))
    run(second, range(2, 4))
    assert_same_bits(parameters(straight, "large"), parameters(second, "large"))


def test_a_saver_that_failed_says_so_at_the_latest_when_it_finishes(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    saver = Saver(tmp_path, Retention(2))
    saver.save(1, trained(cohort()))
    with pytest.raises(MachineError, match="No space left on device"):
        saver.finish()


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_a_members_folder_loads_with_transformers(tmp_path, family):
    model = member("large", 2, family=family)
    place = save(tmp_path, 1, {"large": Trained(model.predictor.model, model.optimizer)})
    loaded, report = AutoModelForMaskedLM.from_pretrained(place / "large", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, model.predictor.model.state_dict()[name], rtol=0, atol=0)


def test_a_malicious_file_executes_nothing(tmp_path):
    """A pickle that would leave a mark when loaded, under the name of each file of a checkpoint in turn."""

    class Mark:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    place = save(tmp_path, 1, trained(cohort()))
    manifest = json.loads((place / "manifest.json").read_text())
    for name in manifest["files"]:
        good, content = (place / name).read_bytes(), pickle.dumps(Mark())
        (place / name).write_bytes(content)
        assert verify(place) == f"{name} differs from its checksum"
        # Even where whoever wrote the file gave it the right checksum.
        entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        changed = {**manifest, "files": {**manifest["files"], name: entry}}
        changed.pop("sha256")
        digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()
        (place / "manifest.json").write_text(json.dumps({**changed, "sha256": digest}))
        with pytest.raises(UserError, match="is no tensor file") if name.endswith(".safetensors") else nullcontext():
            load(place, trained(cohort()))
        (place / name).write_bytes(good)
        (place / "manifest.json").write_text(json.dumps(manifest))
    (place / "manifest.json").write_bytes(pickle.dumps(Mark()))
    assert newest(tmp_path) is None
    assert not (tmp_path / "executed").exists()


def test_a_failing_disk_leaves_what_was_there(tmp_path, monkeypatch):
    built = trained(cohort())
    save(tmp_path, 1, built, keep=2)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(MachineError, match="No space left on device; free some space and resume"):
        save(tmp_path, 2, built, keep=2)
    assert [place.name for place in tmp_path.iterdir()] == ["step-00000001"]
    assert newest(tmp_path) is not None


def test_another_set_of_members_is_refused(tmp_path):
    place = save(tmp_path, 1, trained(cohort()), keep=2)
    with pytest.raises(UserError, match="holds large, small, but the run trains large"):
        load(place, {"large": trained(cohort())["large"]})


def test_another_shape_is_refused(tmp_path):
    place = save(tmp_path, 1, trained(Cohort([member("large", 2)])), keep=2)
    with pytest.raises(UserError, match="is of a model of another shape"):
        load(place, trained(Cohort([member("large", 1)])))


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "place") as fresh:  # noqa: PT012
        (fresh / "file").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_lists_every_file(tmp_path):
    place = save(tmp_path, 1, trained(cohort()), keep=1)
    listed = json.loads((place / "manifest.json").read_text())["files"]
    there = {str(f.relative_to(place)) for f in place.rglob("*") if f.is_file()} - {"manifest.json"}
    assert set(listed) == there
