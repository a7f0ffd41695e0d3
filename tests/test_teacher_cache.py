"""Cached teachers: what they say is what the live teacher says, and nothing can be read beside its row."""

import itertools
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from codistill import caching
from codistill.build import build
from codistill.cli import main
from codistill.errors import MachineError, UserError
from codistill.loading import load, override, to_dict, to_yaml
from codistill.metrics import read_metrics
from codistill.objectives import Batch
from codistill.teacher_cache import TeacherCache, fingerprints, taught_steps
from codistill.train import train
from ranks import on_ranks
from runs import refused, weights, with_teachers

CPU = torch.device("cpu")
SETTINGS = "steps=6", "log.every=1", "precision=float32", "evaluate.every=6"


@pytest.fixture(scope="module")
def teachers(teacher, causal_teacher):
    return {"dwt": teacher, "dwt-clm": causal_teacher}


def run_of(recipe, text, teachers, *more):
    return with_teachers(recipe, text, teachers[recipe], *SETTINGS, *more)


def cached(run, folder, **settings):
    """A cache for `run`, its manifest, and `run` reading it."""
    manifest = caching.write(caching.plan(run, "weak", device="cpu", **settings), folder)
    return manifest, load(override(to_dict(run), [f"members.weak.cached={folder}"]))


def taught(folder) -> list[float]:
    return [line["large/from_weak"] for line in read_metrics(folder / "metrics.jsonl") if "held_out" not in line]


def gradients(run, step: int = 1) -> tuple[dict[str, float], list[torch.Tensor]]:
    built = build(run, CPU)
    large = built.cohort.members["large"]
    found = []
    large.optimizer.step = lambda: found.extend(p.grad.clone() for p in large.parameters)
    metrics = built.cohort.step(step, built.batches.at(step))
    return {name: value.item() for name, value in metrics.items()}, found


@pytest.mark.parametrize("recipe", ["dwt", "dwt-clm"])
def test_cached_features_give_the_live_teachers_run(recipe, text, teachers, tmp_path):
    run = run_of(recipe, text, teachers, "data.within_documents=true")
    manifest, reading = cached(run, tmp_path / "cache")
    assert manifest["kl_error"] is None
    calls = []
    built = build(reading, CPU)
    built.cohort.members["weak"].predictor.register_forward_hook(lambda *_: calls.append(1))
    built.cohort.step(0, built.batches.at(0))
    assert calls == []
    live, mine = gradients(run), gradients(reading)
    assert live[0] == pytest.approx(mine[0], rel=1e-6)
    for a, b in zip(live[1], mine[1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
    one, other = train(run, tmp_path / "live"), train(reading, tmp_path / "reading")
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(other)[name], rtol=0, atol=1e-6)
    assert taught(one) == pytest.approx(taught(other), rel=1e-5)


def plain_run(engine, run, out):
    train(replace(run, distributed=engine), out, device="cpu")
    return {}


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_ranks_and_micro_batches_read_their_own_share(engine, text, teachers, tmp_path):
    """The cache was made by one process with two micro-batches of four; here two ranks take one of four each."""
    run = run_of("dwt-clm", text, teachers, "members.large.model.dropout=0")
    _, reading = cached(run, tmp_path / "cache")
    train(run, tmp_path / "live")
    on_ranks(plain_run, engine, load(override(to_dict(reading), ["batch.accumulate=1"])), tmp_path / "ranks")
    live, ranks = weights(tmp_path / "live"), weights(tmp_path / "ranks")
    for name, tensor in live.items():
        torch.testing.assert_close(tensor, ranks[name], rtol=0, atol=1e-4)
    assert taught(tmp_path / "live") == pytest.approx(taught(tmp_path / "ranks"), rel=1e-4)


def test_another_batch_size_reads_the_same_sequences(text, teachers, tmp_path):
    run = run_of("dwt-clm", text, teachers)
    _, reading = cached(run, tmp_path / "cache")
    wide = "batch={sequences: 16, accumulate: 1}", "steps=3"
    live, mine = (gradients(load(override(to_dict(each), wide)), 2) for each in (run, reading))
    assert live[0] == pytest.approx(mine[0], rel=1e-6)


def live_log_p(run, batch):
    """Of the teacher, by its own model: (rows, tokens)."""
    built = build(run, CPU)
    with torch.no_grad():
        logits = built.models["weak"].eval()(**batch.inputs).logits
    size = built.cohort.members["weak"].predictor.vocabulary
    return torch.log_softmax(logits.flatten(0, 1)[batch.rows_N, :size].double(), -1)


@pytest.mark.parametrize("recipe", ["dwt", "dwt-clm"])
def test_the_best_tokens_keep_their_probabilities_and_the_rest_share_theirs(recipe, text, teachers, tmp_path):
    run = run_of(recipe, text, teachers)
    manifest, reading = cached(run, tmp_path / "cache", kind="top_k", few=7)
    batch = build(reading, CPU).batches.at(2)[1]
    said, true = batch.cached["weak"], live_log_p(run, batch)
    best, ids = true.topk(7, -1)
    assert (said.ids.sort().values == ids.sort().values).all()
    torch.testing.assert_close(said.log_p.double(), best, rtol=0, atol=1e-5)
    rest = (1 - best.exp().sum(-1)) / (true.shape[1] - 7)
    torch.testing.assert_close(said.log_rest.double().exp(), rest, rtol=1e-4, atol=0)
    approximate = rest.log()[:, None].expand_as(true).scatter(1, ids, best)
    bias = functional.kl_div(approximate, true, log_target=True, reduction="none").sum(-1).mean()
    assert manifest["kl_error"] == pytest.approx(bias.item(), rel=0.5)
    live, mine = gradients(run)[0], gradients(reading)[0]
    assert live["large/hard"] == mine["large/hard"]
    assert abs(live["large/from_weak"] - mine["large/from_weak"]) > 1e-6
    assert "weak/hard" not in mine


def test_all_tokens_are_the_teacher_itself(text, teachers, tmp_path):
    run = run_of("dwt-clm", text, teachers, "distillation.0.temperature=2", "distillation.0.divergence=reverse_kl")
    manifest, reading = cached(run, tmp_path / "cache", kind="top_k", few=79)
    assert manifest["kl_error"] == pytest.approx(0, abs=1e-6)
    live, mine = gradients(run), gradients(reading)
    assert live[0]["large/from_weak"] == pytest.approx(mine[0]["large/from_weak"], rel=1e-4)
    for a, b in zip(live[1], mine[1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_sampled_tokens_are_drawn_from_the_teacher(text, teachers, tmp_path):
    """Counts of each row sum to the draws, and over all rows each token comes as often as the teacher expects."""
    run = run_of("dwt-clm", text, teachers)
    _, reading = cached(run, tmp_path / "cache", kind="sampled", few=50)
    mass, expected, variance = 0, 0, 0
    built = build(reading, CPU)
    for step in range(3):
        for batch in built.batches.at(step):
            true = live_log_p(run, batch).exp()
            drawn = batch.cached["weak"].rows(slice(None), torch.empty_like(true)).exp()
            torch.testing.assert_close(drawn.sum(-1), torch.ones(len(drawn), dtype=torch.float64), rtol=0, atol=1e-5)
            assert np.allclose((drawn * 50).round(), drawn * 50, atol=1e-3)
            mass, expected = mass + drawn.sum(0), expected + true.sum(0)
            variance = variance + (true * (1 - true) / 50).sum(0)
    assert ((mass - expected).abs() / variance.sqrt()).max() < 5
    metrics, _ = gradients(reading)
    assert np.isfinite(list(metrics.values())).all()


@pytest.mark.parametrize("setting", ["divergence=reverse_kl", "temperature=2"])
def test_sampled_tokens_teach_by_forward_kl_at_temperature_one_only(setting, text, teachers, tmp_path):
    _, reading = cached(run_of("dwt-clm", text, teachers), tmp_path / "cache", kind="sampled", few=5)
    changed = load(override(to_dict(reading), [f"distillation.0.{setting}"]))
    refused("sampled logits are unbiased for forward_kl at temperature 1 only", changed, tmp_path / "run")


def test_probabilities_do_not_teach_by_the_squared_error_of_logits(text, teachers, tmp_path):
    _, reading = cached(run_of("dwt", text, teachers), tmp_path / "cache", kind="top_k", few=5)
    changed = load(override(to_dict(reading), ["distillation.0.divergence=squared_error"]))
    refused("squared_error, which compares logits, and top_k keeps probabilities", changed, tmp_path / "run")


def test_rounded_features_report_their_error(text, teachers, tmp_path):
    run = run_of("dwt", text, teachers)
    manifest, reading = cached(run, tmp_path / "cache", dtype="bfloat16")
    assert 0 < manifest["kl_error"] < 1e-3
    live, mine = gradients(run), gradients(reading)
    assert live[0]["large/from_weak"] == pytest.approx(mine[0]["large/from_weak"], rel=0.05)


@pytest.mark.parametrize("kind", ["features", "top_k", "sampled"])
@pytest.mark.parametrize("recipe", ["dwt", "dwt-clm"])
def test_the_size_is_known_before_it_starts(recipe, kind, text, teachers, tmp_path):
    run = run_of(recipe, text, teachers)
    plan = caching.plan(run, "weak", kind=kind, few=5, device="cpu")
    assert not (tmp_path / "cache").exists()
    each = {"features": 32 * 4, "top_k": 5 * (2 + 4) + 4, "sampled": 5 * (2 + 1)}[kind]
    rows = 31 if recipe == "dwt-clm" else 10
    assert plan.total_bytes == 6 * 8 * (rows * each + 8)
    assert plan.bytes_per_token == pytest.approx((rows * each + 8) / 32)
    assert f"{plan.bytes_per_token:,.1f} bytes a token" in str(plan)
    manifest = caching.write(plan, tmp_path / "cache")
    files = [file for file in (tmp_path / "cache").iterdir() if file.suffix == ".bin"]
    assert sum(file.stat().st_size for file in files) == plan.total_bytes == sum(manifest["bytes"].values())


def test_only_the_steps_that_are_taught_are_cached(text, teachers, tmp_path):
    run = run_of("dwt-clm", text, teachers, "distillation.0.weight={linear: [1, 0, 4]}")
    assert taught_steps(run, "weak") == 4
    manifest, reading = cached(run, tmp_path / "cache")
    assert manifest["sequences"] == 4 * 8
    train(reading, tmp_path / "run")
    late = load(override(to_dict(reading), ["distillation.0.weight=1"]))
    refused("holds 32 sequences, and the run needs 48", late, tmp_path / "late")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["seed=1"], "its seed is 0, and here it is 1"),
        (["data.within_documents=true"], "its within_documents is False, and here it is True"),
        (["data.tokens=1000"], "its tokens is None, and here it is 1000"),
        (["data.length=16"], "its length is 32, and here it is 16"),
        (["members.weak.path=OTHER"], "its teacher is [0-9a-f]{12}…, and here it is"),
        (["data.train=[MORE]"], "its text is [0-9a-f]{12}…, and here it is"),
        (["steps=7"], "holds 48 sequences, and the run needs 56"),
        (["members.weak.cached=runs/nowhere"], "is no teacher cache .*make one with `codistill cache-teacher`"),
    ],
)
def test_a_cache_of_another_run_is_refused(changes, message, text, teachers, tmp_path):
    _, reading = cached(run_of("dwt-clm", text, teachers), tmp_path / "cache")
    other = shutil.copytree(teachers["dwt-clm"], tmp_path / "other")
    model = build(reading, CPU).models["weak"]
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-3
    model.save_pretrained(other)
    more = tmp_path / "more.txt"
    more.write_text(text.read_text() + ". the cat")
    changes = [change.replace("OTHER", str(other)).replace("MORE", str(more)) for change in changes]
    refused(message, load(override(to_dict(reading), changes)), tmp_path / "run")


@pytest.mark.parametrize(("setting", "value"), [("rms_norm_eps", 0.5), ("rope_parameters", {"rope_theta": 50.0})])
def test_a_teacher_of_the_same_weights_that_computes_otherwise_is_another(setting, value, text, teachers, tmp_path):
    run = run_of("dwt-clm", text, teachers)
    _, reading = cached(run, tmp_path / "cache")
    other = shutil.copytree(teachers["dwt-clm"], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    assert setting in config
    changed = config | {setting: {**config[setting], **value} if isinstance(value, dict) else value}
    (other / "config.json").write_text(json.dumps(changed))
    there = f"members.weak.path={other}"
    batch = build(run, CPU).batches.at(0)[0]
    assert not torch.equal(live_log_p(run, batch), live_log_p(load(override(to_dict(run), [there])), batch))
    refused("its teacher is [0-9a-f]{12}…, and here it is", load(override(to_dict(reading), [there])), tmp_path / "run")


def test_the_same_teacher_saved_again_is_the_same(text, teachers, tmp_path):
    run = run_of("dwt-clm", text, teachers)
    _, reading = cached(run, tmp_path / "cache")
    other = shutil.copytree(teachers["dwt-clm"], tmp_path / "other")
    build(reading, CPU).models["weak"].config.save_pretrained(other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"transformers_version": "5.0.0", "dtype": "bfloat16"}))
    build(load(override(to_dict(reading), [f"members.weak.path={other}"])), CPU)


def test_another_masking_rate_is_another_run(text, teachers, tmp_path):
    _, reading = cached(run_of("dwt", text, teachers), tmp_path / "cache")
    changed = load(override(to_dict(reading), ["objective.mask_rate=0.2"]))
    refused("its objective is .*0.3.*, and here it is .*0.2", changed, tmp_path / "run")


def test_rows_that_are_not_those_that_were_cached_are_noticed(text, teachers, tmp_path):
    _, reading = cached(run_of("dwt-clm", text, teachers), tmp_path / "cache")
    built = build(reading, CPU)
    cache = TeacherCache.open(str(tmp_path / "cache"), "members.weak.cached")
    batch = built.batches.at(1)[0]
    cache.read(8, batch)
    assert cache.read(48, batch) is None
    with pytest.raises(UserError, match="sequence 12 is not the one that was cached"):
        cache.read(12, batch)


def test_a_fingerprint_is_of_what_is_shown_what_is_asked_and_where():
    """Of any two of these at least one thing differs, if only in which of two places it stands."""
    tokens = {"as it is": [5, 6, 7, 8], "turned": [6, 5, 7, 8], "others": [5, 6, 7, 9]}
    asked = {"as it is": [7, 8], "turned": [8, 7], "others": [7, 9]}
    rows = {"as it is": [0, 2], "turned": [2, 0], "others": [0, 3]}
    found = set()
    for shown, labels, places in itertools.product(tokens.values(), asked.values(), rows.values()):
        second = [4 + place for place in places]  # the same sequence again has the same fingerprint
        batch = Batch({"input_ids": torch.tensor([shown] * 2)}, torch.tensor(places + second), torch.tensor(labels * 2))
        one, again = fingerprints(batch).tolist()
        assert one == again
        found.add(one)
    assert len(found) == 27


def test_a_cache_that_is_not_whole_is_refused(text, teachers, tmp_path):
    _, reading = cached(run_of("dwt-clm", text, teachers), tmp_path / "cache")
    file = tmp_path / "cache" / "features.bin"
    file.write_bytes(file.read_bytes()[:-4])
    refused(r"features\.bin has \d+ bytes, wanted \d+; make the cache anew", reading, tmp_path / "run")
    file.unlink()
    refused("is no teacher cache .*features.bin", reading, tmp_path / "other")


def test_what_cannot_be_cached_is_refused(text, teachers, tmp_path, monkeypatch):
    run = run_of("dwt-clm", text, teachers)
    for name in ("large", "nobody"):
        with pytest.raises(UserError, match=f"--member {name}: only a frozen member can be cached; frozen are weak"):
            caching.plan(run, name)
    with pytest.raises(UserError, match="it teaches nobody at any step"):
        caching.plan(load(override(to_dict(run), ["distillation.0.weight=0"])), "weak")
    with pytest.raises(UserError, match="--k 80: top_k keeps between 1 and 79 tokens"):
        caching.plan(run, "weak", kind="top_k", few=80, device="cpu")
    with pytest.raises(UserError, match=r"members\.large\.cached: large is trained"):
        load(override(to_dict(run), ["members.large.cached=x"]))
    plan = caching.plan(run, "weak", device="cpu")
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there exists; give another --out"):
        caching.write(plan, tmp_path / "there")
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(MachineError, match=r"the cache takes [\d,]+ bytes and 10 are free"):
        caching.write(plan, tmp_path / "full")
    assert not (tmp_path / "full").exists()


def test_the_command_says_the_size_and_how_to_go_on(text, teachers, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(to_yaml(run_of("dwt-clm", text, teachers)))
    out = tmp_path / "cache"
    arguments = ["cache-teacher", str(tmp_path / "run.yaml"), "--member", "weak", "--out", str(out), "--device", "cpu"]
    main([*arguments, "--kind", "top_k", "--k", "5"])
    said = capsys.readouterr().out
    assert "top_k of weak: ids 5 × int16, log_p 5 × float32, log_rest 1 × float32 a predicted row" in said
    assert f"--set members.weak.cached={out}; KL(teacher to cached)" in said
    assert json.loads((out / "manifest.json").read_text())["kind"] == "top_k"
