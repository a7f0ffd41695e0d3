"""What the members of a run cost, and how much of the text the run uses."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForMaskedLM, DebertaV2Config, DebertaV2ForMaskedLM, LlamaConfig, LlamaForCausalLM
from transformers.models.deberta_v2 import modeling_deberta_v2

from codistill.build import build
from codistill.config import DistillationConfig, MemberConfig, Run
from codistill.costs import member_flops, pass_flops
from codistill.train import train
from cohorts import predictor
from runs import small_run, with_teachers

CPU = torch.device("cpu")


def of_members(folder, key="flops"):
    return {name: member[key] for name, member in json.loads((folder / "results.json").read_text())["members"].items()}


def test_a_trained_member_takes_three_forward_passes_a_step(text, tmp_path):
    """The oracle counts a real pass of Hugging Face's model, output embedding included."""
    out = train(small_run("standalone-clm", text, "steps=4"), tmp_path / "run")
    config = LlamaConfig.from_pretrained(out / "members" / "large")
    config._attn_implementation = "eager"  # whose products PyTorch counts on every device
    rows_BT = torch.zeros(8, 32, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        LlamaForCausalLM(config)(rows_BT)
    own = of_members(out)["large"]
    head = 2 * config.hidden_size * config.vocab_size
    not_predicted = 8 * head  # the last position of a row predicts nothing
    # The rotary angles of the positions are a product too, and a handful of operations.
    assert own["own"] == pytest.approx(4 * 3 * (counter.get_total_flops() - not_predicted), rel=0.01)
    assert own["teachers"] == 0


def test_a_frozen_teacher_is_paid_for_while_it_teaches(text, teacher, tmp_path):
    out = train(with_teachers("dwt", text, teacher, "distillation.0.weight={step: {0: 1, 5: 0}}"), tmp_path / "run")
    flops, seconds = of_members(out), of_members(out, "seconds")
    always = of_members(train(with_teachers("dwt", text, teacher), tmp_path / "always"))
    assert flops["weak"]["own"] == flops["large"]["teachers"] == always["large"]["teachers"] * 5 // 20
    assert flops["large"]["own"] == always["large"]["own"]
    assert seconds["weak"] < seconds["large"]


def test_a_frozen_teacher_of_states_alone_has_no_product_with_its_output_embedding(text, teacher, tmp_path):
    states = "distillation.0.kind=hidden"
    out = train(with_teachers("dwt", text, teacher, states, "steps=4"), tmp_path / "run")
    whole = of_members(train(with_teachers("dwt", text, teacher, "steps=4"), tmp_path / "whole"))
    model = AutoModelForMaskedLM.from_pretrained(out / "members" / "weak")
    rows = 8 * 10  # of each of 8 sequences of 32 tokens, 30 % are predicted
    head = 2 * model.config.hidden_size * model.config.vocab_size * rows
    for name, part in (("weak", "own"), ("large", "teachers")):
        assert whole[name][part] - of_members(out)[name][part] == 4 * head


def test_a_teacher_that_is_read_from_a_cache_costs_nothing():
    """Beside it a teacher that is run, for 3 of 4 steps."""
    live, read = MemberConfig(path="live", frozen=True), MemberConfig(path="read", frozen=True, cached="folder")
    edges = [
        DistillationConfig(teacher="live", student="large", weight={"step": {0: 1, 3: 0}}),
        DistillationConfig(teacher="read", student="large"),
    ]
    run = Run(members={"live": live, "read": read, "large": MemberConfig()}, distillation=edges, steps=4)
    models = {name: predictor(name, family="bert").model for name in run.members}
    once = pass_flops(models["live"], sequences=run.batch.sequences, length=run.data.length, rows=80)
    found = member_flops(run, models, rows=80, steps=range(4))
    assert found["read"] == {"own": 0, "teachers": 0}
    assert found["live"]["own"] == found["large"]["teachers"] == 3 * sum(once) > 0


def test_peers_pay_for_themselves(text, tmp_path):
    flops = of_members(train(small_run("ctcd", text, "steps=2"), tmp_path / "run"))
    assert [of["teachers"] for of in flops.values()] == [0, 0]
    assert flops["large"]["own"] > flops["small"]["own"] > 0


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torchscript_in_a_models_file_is_counted_as_its_python(monkeypatch):
    """As transformers before 5.23 has it in DeBERTa's, where a run failed at its end."""
    config = DebertaV2Config(
        **{"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"intermediate_size": 32, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]},
    )
    model = DebertaV2ForMaskedLM(config)
    name = "make_log_bucket_position"
    found = getattr(modeling_deberta_v2, name)
    plain = getattr(found, "_torchdynamo_inline", found)
    monkeypatch.setattr(modeling_deberta_v2, name, plain)
    expected = pass_flops(model, sequences=2, length=12, rows=3)
    scripted = torch.jit.script(plain)
    monkeypatch.setattr(modeling_deberta_v2, name, scripted)
    assert pass_flops(model, sequences=2, length=12, rows=3) == expected
    assert getattr(modeling_deberta_v2, name) is scripted


def test_a_run_uses_only_the_tokens_it_is_given(text, tmp_path):
    run = small_run("standalone", text, "data.tokens=640", "steps=10", "precision=float32")
    assert build(run, CPU).batches.num_rows == 20
    assert json.loads((train(run, tmp_path / "run") / "results.json").read_text())["passes"] == 10 * 8 / 20
