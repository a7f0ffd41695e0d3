"""Gradient checkpointing, early stopping, the best step of each member, weight norms, and the learning-rate finder."""

import io
import json
import shutil
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from codistill.build import build
from codistill.cli import main
from codistill.errors import UserError
from codistill.loading import load, override, to_dict
from codistill.metrics import read_metrics
from codistill.rates import Trial, rates_table, try_rates, with_peak
from codistill.train import Stopped, train
from ranks import on_ranks
from runs import assert_same_run, refused, small_run, with_teachers

CPU = torch.device("cpu")
# A rate at which so small a model gets worse before long.
DIVERGING = ["members.large.lr=0.3", "steps=60", "evaluate.every=3", "stop_early={patience: 2}", "checkpoint.every=4"]


@pytest.fixture(scope="module")
def stopped_early(text, tmp_path_factory) -> Path:
    return train(small_run("standalone", text, *DIVERGING), tmp_path_factory.mktemp("early") / "run")


def lines_of(out, kind: str) -> list[dict]:
    return [line for line in read_metrics(out / "metrics.jsonl") if kind in line]


# ---- gradient checkpointing --------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_gradient_checkpointing_changes_no_bit_and_runs_each_layer_twice(family, text, tmp_path):
    """With dropout, whose noise has to be the same both times."""
    kept = small_run("ctcd", text, "steps=4", f"members.large.model.family={family}")
    run = load(override(to_dict(kept), ["members.large.gradient_checkpointing=true"]))
    assert_same_run(train(kept, tmp_path / "kept"), train(run, tmp_path / "recomputed"))
    built = build(replace(run, precision="float32"), CPU)
    calls = dict.fromkeys(built.models, 0)
    for name, model in built.models.items():

        def count(*_, name=name):
            calls[name] += 1

        norms = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
        norms[-1].register_forward_pre_hook(count)
    built.cohort.step(0, built.batches.at(0))
    assert calls == {"large": 2 * calls["small"], "small": run.batch.accumulate}


def trained_on_a_rank(run, out) -> dict[str, float]:
    with redirect_stderr(io.StringIO()):
        train(replace(run, distributed="fsdp2"), out, device="cpu")
    return {}


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_bit_of_shards_either(text, tmp_path):
    kept = small_run("ctcd", text, "steps=4", "batch.sequences=8")
    for name, run in (
        ("kept", kept),
        ("recomputed", load(override(to_dict(kept), ["members.large.gradient_checkpointing=true"]))),
    ):
        on_ranks(trained_on_a_rank, run, tmp_path / name)
    assert_same_run(tmp_path / "kept", tmp_path / "recomputed")


def test_a_frozen_member_has_nothing_to_recompute(text, teacher):
    with pytest.raises(UserError, match=r"^members\.weak\.gradient_checkpointing: a frozen member keeps"):
        with_teachers("dwt", text, teacher, "members.weak.gradient_checkpointing=true")


# ---- early stopping, the best step -------------------------------------------------------------


def test_a_run_stops_early_once_the_loss_has_not_fallen(stopped_early):
    out = stopped_early
    held_out = [(line["step"], line["held_out"]["large"]["loss"]) for line in lines_of(out, "held_out")]
    losses = [loss for _, loss in held_out]
    last, best = held_out[-1][0], min(held_out, key=lambda pair: pair[1])
    assert last < 60
    assert min(losses) == losses[-3]  # the two after it are the patience, and before there was no such pair
    assert all(min(losses[i : i + 2]) < min(losses[:i]) for i in range(1, len(losses) - 2))
    results = json.loads((out / "results.json").read_text())
    assert (results["steps"], results["stopped_early"], results["tokens"]) == (last, True, last * 8 * 32)
    assert results["members"]["large"]["best"] == {"step": best[0], "loss": best[1]}
    assert results["members"]["large"]["loss"] == held_out[-1][1]
    assert (out / "checkpoints" / f"step-{last:08d}").is_dir()


@pytest.mark.parametrize("back", [2, 3, 20])
def test_an_early_stop_is_the_same_after_a_resumption(back, stopped_early, text, tmp_path):
    """So many steps before its end: between the two evaluations of its patience, at the first, and long before."""
    run = small_run("standalone", text, *DIVERGING)
    stop = json.loads((stopped_early / "results.json").read_text())["steps"] - back
    with pytest.raises(Stopped):
        train(run, tmp_path / "resumed", stop_at=stop)
    assert_same_run(stopped_early, train(run, tmp_path / "resumed", resume=True))


def test_a_run_that_stopped_early_stays_stopped_until_it_is_given_more_patience(stopped_early, text, tmp_path):
    run = small_run("standalone", text, *DIVERGING)
    out = shutil.copytree(stopped_early, tmp_path / "run")
    before = (out / "metrics.jsonl").read_text(), json.loads((out / "results.json").read_text())
    train(run, out, resume=True)
    after = (out / "metrics.jsonl").read_text(), json.loads((out / "results.json").read_text())
    assert before[0] == after[0]
    for results in (before[1], after[1]):
        for timed in (results, *results["members"].values()):
            timed["seconds"] = 0
    assert before[1] == after[1]
    patient = load(override(to_dict(run), ["stop_early.patience=100", "steps=36"]))
    train(patient, out, resume=True, accept_changes=True)
    assert json.loads((out / "results.json").read_text())["steps"] == 36


def test_a_fall_below_the_least_that_counts_is_none(text, tmp_path):
    out = train(
        small_run("standalone", text, "evaluate.every=4", "stop_early={patience: 2, least: 50}"), tmp_path / "run"
    )
    assert json.loads((out / "results.json").read_text())["steps"] == 12


def test_each_members_best_step_is_kept_and_named(text, tmp_path):
    """The large member diverges after a while; the small one learns."""
    settings = [
        "members.large.lr={step: {0: 3e-3, 6: 1}}",
        "members.small.lr=3e-3",
        "steps=16",
        "evaluate.every=4",
        "distillation=[]",
    ]
    keep = "checkpoint={every: 4, keep: 1, keep_best: true}"
    out = train(small_run("ctcd", text, "distillation=[]", keep, *settings), tmp_path / "run")
    members = json.loads((out / "results.json").read_text())["members"]
    steps = {member["best"]["step"] for member in members.values()}
    assert len(steps) == 2
    assert {int(place.name[5:]) for place in (out / "checkpoints").iterdir()} == steps | {16}
    for line in lines_of(out, "held_out"):
        for name, member in members.items():
            assert line["held_out"][name]["loss"] >= member["best"]["loss"]


# ---- norms -------------------------------------------------------------------------------------


def test_the_log_has_the_norms_of_gradients_and_weights(text, tmp_path):
    out = train(small_run("ctcd", text, "steps=5"), tmp_path / "run")
    (line,) = lines_of(out, "large/weight_norm")
    for name in ("large", "small"):
        # safetensors hold a tied embedding once, as the sum over parameters does
        state = load_file(out / "members" / name / "model.safetensors")
        squares = sum(float(tensor.double().square().sum()) for tensor in state.values())
        assert line[f"{name}/weight_norm"] == pytest.approx(squares**0.5, rel=1e-5)
        assert line[f"{name}/grad_norm"] > 0


# ---- the learning-rate finder ------------------------------------------------------------------


def test_a_trial_is_the_run_with_that_peak_rate(text, tmp_path):
    run = small_run("ctcd", text, "members.small.lr={warmup_linear: [7e-4, 0.1]}", "precision=float32")
    trials = try_rates(run, [1e-3, 5e-3], 6)
    for trial in trials:
        peaks = [f"members.large.lr={{warmup_linear: [{trial.rate}, 0.05]}}"]
        peaks += [f"members.small.lr={{warmup_linear: [{trial.rate}, 0.1]}}", "steps=6"]
        out = train(load(override(to_dict(run), peaks)), tmp_path / str(trial.rate))
        members = json.loads((out / "results.json").read_text())["members"]
        assert trial.losses == {name: pytest.approx(member["loss"], rel=1e-6) for name, member in members.items()}
    assert trials[0].losses != trials[1].losses


def test_a_rate_at_which_something_is_not_finite_has_an_empty_cell(text):
    run = small_run("standalone", text, "members.large.clip=1e30", "precision=float32")
    fine, broken = try_rates(run, [1e-3, 1e30], 8)
    assert fine.losses is not None
    assert broken.losses is None
    console = Console(width=90, record=True)
    console.print(rates_table([fine, broken], list(fine.losses), 8))
    shown = console.export_text()
    assert "not finite" in shown
    assert "large: 0.001, the lowest that was tried" in shown


def test_rates_that_all_diverged_say_so():
    console = Console(width=90, record=True)
    console.print(rates_table([Trial(1.0, None), Trial(2.0, None)], ["a", "b"], 8))
    shown = console.export_text()
    assert shown.count("not finite") == 4
    assert "no rate stayed finite" in shown


def test_the_table_marks_the_lowest_of_each_member():
    trials = [Trial(1e-3, {"a": 3.0, "b": 2.0}), Trial(3e-3, {"a": 2.5, "b": 2.5}), Trial(1e-2, {"a": 2.75, "b": 4.0})]
    console = Console(width=90, record=True)
    console.print(rates_table(trials, list(trials[0].losses), 100))
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert "0.001 3.0000 2.0000 *" in lines
    assert "0.003 2.5000 * 2.5000" in lines
    assert "a: 0.003" in lines
    assert "b: 0.001, the lowest that was tried: try others beyond it" in lines


def test_the_command_prints_the_table(text, capsys):
    sets = [f"data={{train: [{text}], validation: [{text}], tokenizer: 'train:wordpiece:300', length: 32}}"]
    sets += ["batch={sequences: 4}", "members.large.model={layers: 1, width: 32}", "evaluate.sequences=8"]
    main(["lr", "standalone", *(part for s in sets for part in ("--set", s)), "--rates", "1e-3,1e-2", "--steps", "2"])
    assert "after 2 steps, one run of each rate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rates", "message"), [("1e-3,x", "--rates: 'x' is no number"), ("0", "--rates: 0.0 came in where numbers above 0")]
)
def test_a_rate_that_is_none_is_refused(rates, message, text, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["lr", "standalone", "--rates", rates])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_schedule_of_zeros_has_no_peak(text):
    assert with_peak(lambda step: step / 10, 2.0, 6)(5) == 2.0
    with pytest.raises(UserError, match="the schedule is 0 for all of 6 steps"):
        with_peak(lambda step: 0.0, 1e-3, 6)


def test_unknown_ways_to_stop_early_are_refused(text, tmp_path):
    with pytest.raises(UserError, match=r"^stop_early\.patience: 0 came in where at least 1 is wanted"):
        small_run("standalone", text, "stop_early={patience: 0}")
    run = small_run("standalone", text)
    train(run, tmp_path / "run")
    stopping = load(override(to_dict(run), ["stop_early={patience: 1}"]))
    refused("stop_early.least was None and is now 0.0", stopping, tmp_path / "run", resume=True)
