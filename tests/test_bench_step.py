"""What is timed side by side does the same work, and costs are those of the arithmetic."""

import json
import shutil

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from codistill.bench import step as bench
from codistill.bench import step_providers
from codistill.bench.latency import bench_latency
from codistill.build import build
from codistill.costs import forward_cost, head_flops, pass_flops
from codistill.errors import UserError
from codistill.models import Predictor
from codistill.train import train
from runs import small_run


def bert(layers: int = 2, width: int = 64, feed_forward: int = 128) -> BertForMaskedLM:
    config = BertConfig(
        vocab_size=100,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=feed_forward,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForMaskedLM(config)


def test_forward_flops_are_those_of_the_products():
    layers, width, inner, sequences, length, rows = 2, 64, 128, 3, 16, 10
    cost = forward_cost(bert(), vocabulary=100, sequences=sequences, length=length, rows=rows, precision=torch.float32)
    a_token = 4 * width * width + 2 * width * inner  # queries, keys, values, output; the two feed-forward products
    attention = 2 * length * width  # q kᵀ and the weighted sum of values, for one token
    transform = rows * width * width
    assert cost.flops == 2 * (layers * sequences * length * (a_token + attention) + transform)
    assert cost.width == width
    assert cost.parameters == sum(p.numel() for p in bert().parameters())
    assert head_flops(width, 100, rows) == 2 * rows * 100 * width


def test_saved_bytes_are_those_that_a_real_pass_keeps():
    model, sequences, length, rows = bert(), 3, 16, 10
    cost = forward_cost(model, vocabulary=100, sequences=sequences, length=length, rows=rows, precision=torch.float32)
    predictor, kept = Predictor(model, 100).train(), {}
    own = {p.data_ptr() for p in predictor.parameters()}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        predictor({"input_ids": torch.zeros(sequences, length, dtype=torch.int64)}, torch.arange(rows))
    assert cost.saved_bytes == pytest.approx(sum(t.untyped_storage().nbytes() for t in kept.values()), rel=0.02)


@pytest.mark.parametrize("recipe", ["ctcd:tiny", "ctcd-clm:tiny"])
def test_only_what_computes_the_same_gradients_is_timed(recipe, text, monkeypatch, tmp_path, capsys):
    def wrong(run, device):
        loop = step_providers.ours(run, device)
        right = loop.gradients

        def gradients(step, batches):
            right(step, batches)
            next(iter(loop.models.values())).get_output_embeddings().weight.grad *= 1.1

        loop.gradients = gradients
        return loop

    monkeypatch.setattr(
        bench,
        "PROVIDERS",
        {name: bench.PROVIDERS[name] for name in ("ours", "ours, one by one", "plain", "plain, all rows")}
        | {"wrong": bench.Provider(wrong), "absent": bench.Provider(lambda *_: __import__("no_such_peer"))},
    )
    run = small_run(recipe, text, "batch={sequences: 4}", "precision=float32")
    result = bench.bench_step(run, runs=1, out=tmp_path / "step.json")
    rows = {row["provider"]: row for row in result["results"]}
    built = build(run, torch.device("cpu"))
    (micro_batch,) = built.batches.at(0)
    sizes = {"sequences": 4, "length": 32, "rows": len(micro_batch.labels_N)}
    assert result["run"]["flops"] == 3 * sum(sum(pass_flops(model, **sizes)) for model in built.models.values())
    for name in ("ours", "plain", "plain, all rows"):
        assert rows[name]["cosine"] == pytest.approx(1, abs=1e-6)
        assert rows[name]["norm_ratio"] == pytest.approx(1, abs=1e-5)
        assert rows[name]["tokens_per_second"] == pytest.approx(4 * 32 / rows[name]["seconds"]["median"])
    assert "seconds" in rows["ours, one by one"]
    assert "its gradients differ" in rows["wrong"]["reason"]
    assert "no_such_peer" in rows["absent"]["reason"]
    assert "seconds" not in rows["wrong"]
    assert "seconds" not in rows["absent"]
    assert json.loads((tmp_path / "step.json").read_text()) == result
    assert set(result["phases"]) == {"data", "forward", "loss", "backward", "update"}
    said = capsys.readouterr()
    assert "not run: wrong" in said.out
    said_of = [line for line in said.err.splitlines() if line.startswith(("gradients", "memory", "timing"))]
    assert said_of == [
        "gradients, 1 of 6: ours",
        "gradients, 2 of 6: ours, one by one",
        "gradients, 3 of 6: plain",
        "gradients, 4 of 6: plain, all rows",
        "gradients, 5 of 6: wrong",
        "gradients, 6 of 6: absent",
        "memory, 1 of 4: ours",
        "memory, 2 of 4: ours, one by one",
        "memory, 3 of 4: plain",
        "memory, 4 of 4: plain, all rows",
        "timing, turn 1 of 2",
    ]


def test_an_unknown_provider_is_refused(text):
    with pytest.raises(UserError, match="providers: 'theirs' is unknown; known are 'ours', 'ours, compiled', 'ours, o"):
        bench.bench_step(small_run("ctcd:tiny", text), providers=["theirs"])


def test_latency_is_of_every_member_with_its_loss(text, tmp_path, capsys):
    folder = train(small_run("ctcd:tiny", text, "steps=2"), tmp_path / "pair", device="cpu")
    result = bench_latency(
        [folder, folder / "members" / "small"], lengths=[16], batch=3, runs=5, out=tmp_path / "l.json"
    )
    rows = {row["model"]: row for row in result["results"]}
    assert set(rows) == {"pair/large", "pair/small", "small"}
    results = json.loads((folder / "results.json").read_text())["members"]
    for name, row in rows.items():
        member = name.rpartition("/")[2]
        one, many = row["latency"]["16"], row["throughput"]["16"]
        assert one["p50_ms"] <= one["p90_ms"] <= one["p99_ms"]
        assert many["tokens_per_second"] == pytest.approx(3 * 16 / many["p50_ms"] * 1000)
        assert row["held_out_loss"] == results[member]["loss"]
        assert row["bytes"] == (folder / "members" / member / "model.safetensors").stat().st_size
        assert row["format"] == "hf"
    assert json.loads((tmp_path / "l.json").read_text()) == result
    assert "pair/large" in capsys.readouterr().out


def test_latency_refuses_what_is_no_model_and_what_is_too_long(text, tmp_path):
    with pytest.raises(UserError, match="no model and no finished run"):
        bench_latency([tmp_path])
    folder = train(small_run("standalone:tiny", text, "steps=1"), tmp_path / "one", device="cpu")
    with pytest.raises(UserError, match=r"--length 100000: .* takes at most 512 tokens"):
        bench_latency([folder], lengths=[100_000], runs=1)
    for wrong in ({"runs": 0}, {"batch": 0}, {"lengths": [16, 0]}):
        with pytest.raises(UserError, match="0: at least one is needed"):
            bench_latency([folder], **wrong)
    shutil.copytree(folder, tmp_path / "elsewhere" / "one")
    with pytest.raises(UserError, match="would both be called one/large; rename one folder"):
        bench_latency([folder, tmp_path / "elsewhere" / "one"], runs=1)
