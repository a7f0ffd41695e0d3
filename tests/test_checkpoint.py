"""Checkpoints: exact, atomic, verified."""

import json

import pytest

from codistill import checkpoint
from codistill.checkpoint import Trained, atomic_folder, load, newest, save, verify
from codistill.cohort import Cohort, Distillation
from codistill.errors import MachineError, UserError
from cohorts import assert_same_bits, member, parameters, run


def cohort() -> Cohort:
    return Cohort([member("large", 2), member("small")], [Distillation("large", "small")])


def trained(built: Cohort) -> dict[str, Trained]:
    return {m.name: Trained(m.predictor.model, m.optimizer) for m in built.trained}


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


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "empty"])
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
    else:
        for inside in [*bad.rglob("*.*")]:
            inside.unlink()
    assert newest(tmp_path) == good
    assert "step-00000002 is damaged" in capsys.readouterr().out
    assert (tmp_path / "step-00000002.damaged").is_dir()
    assert verify(good) is None


def test_a_failing_disk_leaves_what_was_there(tmp_path, monkeypatch):
    built = trained(cohort())
    save(tmp_path, 1, built, keep=2)

    def full(*_):
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
    with pytest.raises(UserError, match="is of another model"):
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
