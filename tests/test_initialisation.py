"""How members start: at random by their own seed, or from another model, remapped or by maps learned on the text."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from codistill.build import build
from codistill.errors import UserError
from codistill.loading import load, override, read_run, to_dict
from codistill.machine import device_name
from codistill.train import train
from cohorts import assert_same_bits, predictor
from runs import small_run

CPU = torch.device("cpu")


def test_a_random_start_depends_on_the_seed_and_the_members_name_alone():
    def start(name: str, seed: int) -> list[torch.Tensor]:
        return [parameter.detach() for parameter in predictor(name, seed=seed).parameters() if parameter.dim() > 1]

    torch.manual_seed(5)
    one = start("large", 0)
    torch.manual_seed(6)
    assert_same_bits(one, start("large", 0))
    for other in (start("large", 1), start("small", 0)):
        for a, b in zip(one, other, strict=True):
            assert (a - b).std() > a.std()  # √2 times as much, where they have nothing in common


def test_the_seed_of_a_run_is_that_of_its_members_and_of_their_noise(text):
    run = small_run("standalone", text, "precision=float32")
    one, other = (build(replace(run, seed=seed), CPU) for seed in (0, 1))
    a, b = (built.cohort.members["large"].predictor.output_weight for built in (one, other))
    assert (a - b).std() > a.std()
    assert (one.cohort.seed, other.cohort.seed) == (0, 1)


def test_a_member_grows_from_another_runs_member(text, teacher, tmp_path):
    """The DWT paper's remapping: layers 1–2 from 1–2, layers 3 and 4 from the last; fresh optimizer moments."""
    run = small_run(
        "standalone", text, "data.tokenizer=null", "members.large.model.layers=4", "steps=2", "precision=float32"
    )
    run = load(override(to_dict(run), [f"members.large.init={{from: {teacher}, depth: repeat-last}}"]))
    grown = build(run, CPU).models["large"].state_dict()
    source = load_file(teacher / "model.safetensors")
    for layer, origin in enumerate((0, 1, 1, 1)):
        name = "model.layers.{}.mlp.Wi.weight"
        torch.testing.assert_close(grown[name.format(layer)], source[name.format(origin)], rtol=0, atol=0)
    out = train(run, tmp_path / "run")
    assert load(read_run(out / "run.yaml")) == replace(run, provenance=load(read_run(out / "run.yaml")).provenance)
    facts = load(read_run(out / "run.yaml")).provenance
    assert "large" in facts["members"]
    assert facts["machine"]["device"] == device_name(CPU)


def test_a_model_without_a_tokenizer_takes_no_new_one(text, teacher, tmp_path, capsys):
    """Its tokens have numbers that only its own tokenizer knows."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((teacher / name).read_bytes())
    new = small_run("dwt", text, f"members.weak.path={bare}", "precision=float32")
    with pytest.raises(UserError, match=r"members\.weak: .*bare' has no tokenizer beside it, and a new one"):
        build(new, CPU)
    none = small_run("dwt", text, f"members.weak.path={bare}", "data.tokenizer=null", "precision=float32")
    with pytest.raises(UserError, match=r"tokenizer .*bare: "):
        build(none, CPU)
    given = f"data.tokenizer={teacher}"
    build(small_run("dwt", text, f"members.weak.path={bare}", given, "precision=float32"), CPU)
    assert "members.weak: " in (said := capsys.readouterr().err)
    assert "the run's is taken on trust" in said
    assert "data.validation: " in said  # the same file as data.train here
    assert "held-out scores are of seen text" in said


def test_a_member_grows_by_maps_learned_on_the_text(text, teacher):
    run = small_run("standalone", text, "data.tokenizer=null", "members.large.model.layers=3", "precision=float32")
    start, learned = (
        build(load(override(to_dict(run), [f"members.large.init={{from: {teacher}, {way}}}"])), CPU).models["large"]
        for way in ("depth: stack", "learned: 3")
    )
    a, b = start.state_dict(), learned.state_dict()
    assert any(not torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("way", ["depth: stack", "learned: 1"])
def test_a_member_grows_from_no_weight_that_is_not_finite(way, text, teacher, tmp_path):
    spoilt = tmp_path / "spoilt"
    shutil.copytree(teacher, spoilt)
    tensors = load_file(spoilt / "model.safetensors")
    tensors["model.layers.0.mlp.Wo.weight"][0, 0] = float("nan")
    save_file(tensors, spoilt / "model.safetensors", metadata={"format": "pt"})
    run = to_dict(small_run("standalone", text, "data.tokenizer=null", "precision=float32"))
    with pytest.raises(UserError, match=r"^members.large.init.from: .* NaN or infinite"):
        build(load(override(run, [f"members.large.init={{from: {spoilt}, {way}}}"])), CPU)


def test_an_initialisation_that_cannot_be_had_is_refused(text, teacher, tmp_path):
    run = to_dict(small_run("standalone", text, "data.tokenizer=null"))
    for init, message in (
        (f"{{from: {teacher}, depth: stakc}}", "^members.large.init: depth: 'stakc' is no method"),
        (f"{{from: {tmp_path / 'none'}}}", "^members.large.init.from: .*none: no such file"),
        ("{from: nowhere}", "^members.large.init.from: nowhere: no such file"),
        (f"{{from: {teacher}, depth: 3}}", "init.depth: 3 came in where text is wanted"),
    ):
        with pytest.raises(UserError, match=message):
            build(load(override(run, [f"members.large.init={init}"])), CPU)
