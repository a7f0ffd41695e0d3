"""What a run will take, against what PyTorch then counts."""

import json
from unittest import mock

import pytest
import torch

from codistill import plan as planning
from codistill.cli import main
from codistill.config import ModelConfig
from codistill.costs import forward_cost
from codistill.errors import UserError
from codistill.loading import load, override, to_dict
from codistill.models import new_model
from codistill.plan import memory_of, model_of, plan
from codistill.recipes import find
from plans import planned_and_counted_memory
from runs import small_run, with_teachers

CPU = torch.device("cpu")
WIDE = ["members.large.model.width=128", "data.tokenizer=train:wordpiece:8000", "batch.sequences=16"]


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("ctcd:tiny", ["precision=float32", "members.small.model.width=128", *WIDE]),
        ("ctcd:tiny", ["precision=bfloat16", "members.small.model.width=64", "batch.accumulate=2", *WIDE]),
        ("standalone:tiny", ["precision=float32", "data.tokenizer=train:wordpiece:30000", "batch.sequences=4"]),
        ("ctcd-clm:tiny", ["precision=bfloat16", "members.small.model.width=128", *WIDE]),
    ],
)
def test_memory_is_within_15_percent_of_what_is_then_counted(recipe, settings):
    planned, counted = planned_and_counted_memory(load(override(to_dict(find(recipe)), settings)))
    assert planned == pytest.approx(counted, rel=0.15)


def test_a_frozen_member_takes_room_for_its_parameters_and_none_to_learn():
    run = load(override(to_dict(find("kd:tiny")), ["members.teacher.path=somewhere"]))
    config = ModelConfig(family="bert", layers=1, width=32, heads=2)
    models = {n: new_model(config, vocabulary=500, length=64, tokenizer=None, seed=0, name=n) for n in run.members}
    size = sum(parameter.numel() for parameter in models["teacher"].parameters())
    assert [name for name in models if not run.members[name].frozen] == ["small"]
    memory = memory_of(run, models, 500, torch.float32, "cpu")
    assert memory["parameters"] == 2 * 4 * size
    assert memory["gradients"] == 4 * size
    assert memory["optimizer states"] == 8 * size
    assert memory["gradients of output layers"] == 4 * 500 * 32
    shape = {"sequences": run.batch.sequences, "length": run.data.length, "rows": run.rows_per_step}
    cost = forward_cost(models["small"], vocabulary=500, precision=torch.float32, **shape)
    assert memory["activations"] == cost.saved_bytes


def test_on_a_cpu_no_copy_of_the_output_embedding_is_planned():
    run = load(override(to_dict(find("ctcd:tiny")), ["members.small.model.width=64"]))
    models = {name: model_of(run, name, 5000) for name in run.members}
    buffers = {
        (precision, device): memory_of(run, models, 5000, precision, device)["the loss's buffers"]
        for precision in (torch.float32, torch.bfloat16)
        for device in ("cpu", "cuda")
    }
    features = 64 * 19 * (128 + 64)  # of the predicted rows, 2 bytes instead of 4
    assert buffers[torch.float32, "cpu"] - buffers[torch.bfloat16, "cpu"] == 2 * features
    copies = 2 * 5000 * (128 + 64)
    assert buffers[torch.bfloat16, "cuda"] - buffers[torch.float32, "cuda"] == copies - 2 * features


@pytest.mark.parametrize("family", ["bert", "modernbert", "llama"])
def test_attention_on_a_gpu_keeps_no_weights(family):
    """Of equally many tokens longer rows need no more there: all that is kept is by token, but for a mask or two."""
    config = ModelConfig(family=family, layers=4, width=64, heads=2, dropout=0.1)
    model = new_model(config, vocabulary=100, length=256, tokenizer=None, seed=0, name="one")
    shape = {"vocabulary": 100, "rows": 10, "precision": torch.bfloat16}
    kept = {
        (device, length): forward_cost(
            model, **shape, device=device, length=length, sequences=1024 // length
        ).saved_bytes
        for device in ("cpu", "cuda")
        for length in (64, 256)
    }
    pairs = 1024 * (256 - 64)  # tokens · keys
    assert kept["cuda", 256] - kept["cuda", 64] < 10 * pairs  # of no layer and no head
    assert kept["cpu", 256] - kept["cpu", 64] > 2 * 4 * 2 * pairs  # of 4 layers and 2 heads, more than once


def test_squared_errors_need_room_on_a_gpu_too():
    def buffers(divergence: str) -> int:
        run = load(override(to_dict(find("ctcd:tiny")), [f"distillation.0.divergence={divergence}"]))
        models = {name: model_of(run, name, 5000) for name in run.members}
        return memory_of(run, models, 5000, torch.float32, "cuda")["the loss's buffers"]

    assert buffers("squared_error") - buffers("reverse_kl") >= 2 * 5000 * 64 * 19 * 4  # at least two members' softmaxes


def test_a_plan_says_what_the_run_then_says(text, teacher, tmp_path):
    run = with_teachers("dwt", text, teacher, f"data.tokenizer={teacher}")
    found = plan(run, CPU)
    assert found.tokens == 20 * 8 * 32
    assert found.flops["large"]["teachers"] == found.flops["weak"]["own"] > 0
    assert found.flops["large"]["own"] > found.flops["weak"]["own"]
    assert found.seconds is not None


@pytest.mark.parametrize(("budget", "rows"), [(None, 80), (40 * 32, 40), (10**9, 80)])
def test_a_text_is_seen_as_often_as_its_tokens_or_fewer_that_are_used_last(budget, rows, tmp_path):
    """Of 80 · 32 tokens, whatever is allowed beyond these."""
    (tmp_path / "manifest.json").write_text(json.dumps({"tokens": 80 * 32, "units": 5}))
    sets = ["steps=20", "batch={sequences: 8, accumulate: 1}", "data.length=32", f"data.tokens={json.dumps(budget)}"]
    run = load(override(to_dict(find("standalone:tiny")), [*sets, f"data.train=[{tmp_path}]"]))
    with mock.patch.object(
        planning, "read_manifest", lambda folder: json.loads((folder / "manifest.json").read_text())
    ):
        assert planning._passes(run, 20 * 8 * 32) == 20 * 8 / rows
        padded = load(override(to_dict(run), ["data.packing=padded", "data.tokens=null"]))
        assert planning._passes(padded, 20 * 8 * 32) == 20 * 8 / 5


def test_what_does_not_fit_is_named_with_what_to_lower(text, monkeypatch):
    monkeypatch.setattr(planning, "_free_bytes", lambda device: 1000)
    found = plan(small_run("standalone", text), CPU)
    assert found.seconds is None
    assert "0.0 GiB are free; the most goes to activations: lower batch.sequences or raise " in found.why_not
    wide = ["members.large.model.width=512", "batch={sequences: 1, accumulate: 1}"]
    large = load(override(to_dict(small_run("standalone", text)), wide))
    assert "the most goes to optimizer states: take smaller members" in plan(large, CPU).why_not


def test_what_is_too_large_to_try_has_no_time_and_says_so():
    run = load(override(to_dict(find("standalone:small")), ["data.train=[x]"]))
    found = plan(run, CPU)
    assert found.seconds is None
    assert "FLOPs is too large to try here" in found.why_not
    assert found.parameters["large"] > 2e7


def test_the_command_prints_the_plan_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["train", "ctcd:tiny", "--plan", "--set", "batch.sequences=2"])
    said = capsys.readouterr().out
    shown = ("1,000 steps, 128,000 tokens", "large", "FLOPs in all; about", "activations:", "in use at once by tensors")
    for part in shown:
        assert part in said
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_without_text_has_a_plan(tmp_path, capsys):
    """`ctcd:small` names none; docs/run-folder.md shows this command."""
    settings = ["data.tokenizer=train:wordpiece:300", "members.large.model={layers: 1, width: 32}"]
    settings += ["members.small.model={layers: 1, width: 32}", "data.length=16", "batch.sequences=16"]
    main(["train", "ctcd:small", "--plan", *(part for setting in settings for part in ("--set", setting))])
    assert "at most in use at once" in capsys.readouterr().out


def test_a_plan_without_a_vocabulary_says_so():
    run = load(override(to_dict(find("standalone:tiny")), ["data.tokenizer=null"]))
    assert run.members["large"].model == ModelConfig(layers=6, width=128)
    with pytest.raises(UserError, match=r"data\.tokenizer: none is named and no member is pre-trained"):
        plan(run, CPU)
