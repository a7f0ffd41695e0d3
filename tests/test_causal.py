"""Causal language models: what is predicted, by which families, and that nothing is seen that should not be."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from codistill.build import build
from codistill.config import ModelConfig
from codistill.data.batches import Batches
from codistill.data.order import keyed
from codistill.data.prepare import prepare
from codistill.data.tokenizers import Vocabulary
from codistill.errors import UserError
from codistill.families import FAMILIES
from codistill.loading import load, override, to_dict
from codistill.metrics import read_metrics
from codistill.models import Predictor, load_model, new_model
from codistill.objectives import CausalLM
from codistill.train import train
from cohorts import SIZE as OF_A_SMALL_MODEL
from data_examples import documents, vocabulary_file
from runs import refused, small_run, weights, with_teachers

CAUSAL = sorted(name for name, family in FAMILIES.items() if family.objective == "clm")
PAD, CLS, SEP = 0, 2, 3
VOCABULARY = Vocabulary(60, CLS, SEP, PAD, None, np.arange(60) < 5, np.zeros(60, bool), np.arange(5, 60))
LENGTH = 24


def predictor(family: str, seed: int = 0, **settings) -> Predictor:
    config = ModelConfig(family=family, layers=2, width=32, heads=2, **settings)
    return Predictor(new_model(config, vocabulary=60, length=LENGTH, tokenizer=None, seed=seed, name=family), 60).eval()


def batch(ids, lengths=None, positions=None):
    lengths = np.full(len(ids), ids.shape[1]) if lengths is None else lengths
    inputs = {} if positions is None else {"position_ids": positions}
    return CausalLM().batch(ids, lengths, keyed(0, np.arange(len(ids))), VOCABULARY, inputs)


def rows(count: int = 3, seed: int = 0):
    return np.random.default_rng(seed).integers(5, 60, (count, LENGTH))


def test_every_token_but_the_first_is_predicted_from_those_before():
    ids = rows()
    found = batch(ids)
    asked = [(place // LENGTH, place % LENGTH) for place in found.rows_N.tolist()]
    assert asked == [(row, at) for row in range(3) for at in range(LENGTH - 1)]
    assert found.labels_N.tolist() == [ids[row, at + 1] for row, at in asked]
    assert (found.row_weight_N == 1).all()
    assert (found.inputs["input_ids"].numpy() == ids).all()


def test_padding_is_not_predicted():
    found = batch(rows(), lengths=np.array([1, 5, LENGTH]))
    assert found.row_weight_N.reshape(3, -1).sum(1).tolist() == [0, 4, LENGTH - 1]
    assert found.row_weight_N.reshape(3, -1)[1].tolist() == [1] * 4 + [0] * (LENGTH - 5)


def test_no_first_token_of_a_document_is_predicted_where_they_are_kept_apart():
    ids = np.array([[CLS, 9, SEP, 8, 7, SEP, 6, 5]])
    found = batch(ids, positions=np.array([[0, 1, 2, 0, 1, 2, 0, 1]]))
    predicted = found.labels_N[found.row_weight_N == 1].tolist()
    assert predicted == [9, SEP, 7, SEP, 5]
    assert batch(ids).row_weight_N.sum() == 7


@pytest.mark.parametrize("family", CAUSAL)
def test_the_predictor_gives_the_models_own_logits(family):
    """In training mode too, where some models round or cap differently."""
    ours = predictor(family)
    ids = torch.from_numpy(rows())
    found = batch(rows())
    logits_BTV = ours.model(input_ids=ids).logits
    features_ND = ours({"input_ids": ids}, found.rows_N)
    assert ours.output_bias is None
    expected_NV = logits_BTV[:, :-1].flatten(0, 1)
    torch.testing.assert_close(features_ND @ ours.output_weight.T, expected_NV, rtol=0, atol=1e-6)
    theirs = ours.model(input_ids=ids, labels=ids).loss
    loss = torch.nn.functional.cross_entropy(features_ND @ ours.output_weight.T, found.labels_N)
    torch.testing.assert_close(loss, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", CAUSAL)
def test_no_token_sees_those_after_it(family):
    ours, ids = predictor(family), rows(1)
    changed = ids.copy()
    changed[0, 10] = 5 if ids[0, 10] != 5 else 6
    every = torch.arange(LENGTH)
    before, after = (ours({"input_ids": torch.from_numpy(i)}, every) for i in (ids, changed))
    torch.testing.assert_close(before[:10], after[:10], rtol=0, atol=0)
    assert ((before[10:] - after[10:]).abs().amax(1) > 0).all()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", CAUSAL)
def test_documents_that_are_kept_apart_do_not_see_one_another(family, precision, tmp_path):
    """Of real batches: change one document, and no other one's features move; alone, each gives the same."""
    for number, text in enumerate(documents(60, words=3)):
        (tmp_path / f"{number}.txt").write_text(text)
    corpus = prepare([str(tmp_path)], str(vocabulary_file(tmp_path)), tmp_path / "out", processes=1)
    source = Batches(corpus, CausalLM(), length=LENGTH, sequences=4, within_documents=True)
    found = source.at(0)[0]
    assert set(found.inputs) == {"input_ids", "position_ids"}
    ids, places = found.inputs["input_ids"], found.inputs["position_ids"]
    number = (places == 0).cumsum(1)
    row = int(number[:, -1].argmax())
    assert number[row, -1] >= 3
    torch.manual_seed(0)
    config = ModelConfig(family=family, layers=2, width=32, heads=2)
    model = new_model(config, vocabulary=source.vocabulary.size, length=LENGTH, tokenizer=None, seed=0, name="a")
    built, every = Predictor(model, source.vocabulary.size).eval(), torch.arange(LENGTH)

    def ours(inputs, rows):
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            return built(inputs, rows).float()

    before = ours({"input_ids": ids[row : row + 1], "position_ids": places[row : row + 1]}, every)
    changed = ids[row : row + 1].clone()
    second = number[row] == 2
    changed[0, second] = (changed[0, second] + 7) % source.vocabulary.size
    after = ours({"input_ids": changed, "position_ids": places[row : row + 1]}, every)
    torch.testing.assert_close(before[~second], after[~second], rtol=0, atol=0)
    assert ((before[second] - after[second]).abs().amax(1) > 0).all()
    third = number[row] == 3
    alone = ours({"input_ids": ids[row : row + 1, third]}, torch.arange(int(third.sum())))
    rounding = 1e-5 if precision == torch.float32 else 0.05
    torch.testing.assert_close(before[third], alone, rtol=rounding, atol=rounding)


def test_a_run_within_documents_reaches_the_batches(text):
    built = build(
        small_run("standalone-clm", text, "precision=float32", "data.within_documents=true"), torch.device("cpu")
    )
    assert "position_ids" in built.batches.at(0)[0].inputs
    assert "position_ids" in built.held_out[0].inputs


def test_a_masked_teacher_of_a_causal_student_is_refused(text, teacher, causal_teacher, tmp_path):
    wrong = "members.weak.path: .*: modernbert is a masked LM, and objective.name clm is for causal ones: gpt2, llama"
    refused(wrong, with_teachers("dwt-clm", text, teacher), tmp_path / "run")
    wrong = "members.weak.path: .*: llama is a causal LM, and objective.name mlm is for masked ones: bert, modernbert"
    refused(wrong, with_teachers("dwt", text, causal_teacher), tmp_path / "run")
    wrong = "members.large.model.family: bert is a masked LM"
    refused(wrong, small_run("standalone-clm", text, "members.large.model.family=bert"), tmp_path / "run")


SIZE = OF_A_SMALL_MODEL | {"vocab_size": 60}
GATED = SIZE | {"num_key_value_heads": 1, "head_dim": 16, "bos_token_id": 2, "eos_token_id": 3}
LOOK_AHEAD = {
    **{
        f"{name}, made as a masked LM": (f"{name}ForMaskedLM", SIZE, "is_decoder: false")
        for name in ("XLMRoberta", "Camembert", "Ernie", "MegatronBert", "Data2VecText", "RoFormer")
    },
    "Gemma3, both ways": (
        "Gemma3ForCausalLM",
        GATED | {"use_bidirectional_attention": True},
        "use_bidirectional.*true",
    ),
    "Llama, both ways": ("LlamaForCausalLM", GATED | {"is_causal": False}, "is_causal: false"),
}
LOOK_BACK = {
    "RoFormer, as a decoder": ("RoFormerForCausalLM", SIZE | {"is_decoder": True}),
    "GPTNeoX": ("GPTNeoXForCausalLM", SIZE),
    "Mixtral": ("MixtralForCausalLM", GATED | {"num_local_experts": 4}),
}


def saved(kind: str, settings: dict, place):
    """A model of transformers in a folder."""
    made = getattr(transformers, kind)
    torch.manual_seed(0)
    model = made(made.config_class(**settings)).eval()
    model.save_pretrained(place)
    return model


@torch.no_grad()
def sees_the_last(model) -> bool:
    """Whether the logits before the last token of a row depend on it."""
    ids = torch.from_numpy(rows(1))
    other = ids.clone()
    other[0, -1] = 5 if ids[0, -1] != 5 else 6
    return not torch.allclose(*(model(input_ids=i).logits[:, :-1] for i in (ids, other)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", LOOK_AHEAD)
def test_a_model_that_looks_at_later_tokens_is_refused_for_clm(name, tmp_path):
    kind, settings, reason = LOOK_AHEAD[name]
    assert sees_the_last(saved(kind, settings, tmp_path))
    with pytest.raises(
        UserError, match=rf"^members.a.path: .* looks at later tokens \(its config has {reason}\)"
    ) as no:
        load_model(str(tmp_path), "members.a.path", "clm")
    assert "\n" not in str(no.value)


@pytest.mark.parametrize("name", LOOK_BACK)
def test_a_causal_model_of_no_known_family_is_taken_for_clm(name, tmp_path):
    if sees_the_last(saved(*LOOK_BACK[name], tmp_path)):
        pytest.skip(f"that of transformers {transformers.__version__} looks at later tokens")
    load_model(str(tmp_path), "members.a.path", "clm")


@pytest.mark.parametrize("objective", ["mlm", None])
@pytest.mark.parametrize("kind", ["BertForMaskedLM", "RobertaForMaskedLM", "ElectraForMaskedLM"])
def test_a_masked_model_that_looks_only_back_is_refused(kind, objective, tmp_path):
    assert not sees_the_last(saved(kind, SIZE | {"is_decoder": True}, tmp_path))
    with pytest.raises(UserError, match=r"^models: .* does not look at later tokens \(its config has is_decoder: true"):
        load_model(str(tmp_path), "models", objective)


def test_a_context_longer_than_the_positions_is_refused(text, causal_teacher, tmp_path):
    run = with_teachers("dwt-clm", text, causal_teacher, "data.length=600", "batch.sequences=4")
    refused(r"data.length: 600 is more than the 512 positions of members.weak", run, tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
        ({"model_type": "granite"}, "logits_scaling 8"),
    ],
)
def test_capped_and_scaled_logits_are_refused(settings, message, tmp_path):
    from transformers import Gemma3TextConfig, GraniteConfig

    config = GraniteConfig(logits_scaling=8) if "model_type" in settings else Gemma3TextConfig(**settings)
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message) as refusal:
        load_model(str(tmp_path), "members.weak.path")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("family", "shared", "message"),
    [("llama", 3, "takes a number that divides them"), ("gpt2", 1, "takes none: each head has its own")],
)
def test_heads_that_cannot_be_shared_are_refused(family, shared, message, text):
    model = f"members.large.model={{family: {family}, layers: 1, width: 32, heads: 2, key_value_heads: {shared}}}"
    with pytest.raises(UserError, match=message):
        small_run("standalone-clm", text, model)


def padded(folder, rows: int, out):
    """The model of `folder` with embeddings that are `rows` longer, full of numbers that would show."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    size = model.config.vocab_size
    model.resize_token_embeddings(size + rows, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[size:] = 50.0
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    return out


def test_vocabularies_that_differ_by_padding_are_cut_to_the_tokenizers(text, causal_teacher, tmp_path):
    """As 151,936 and 152,064 for one tokenizer: losses and updates are those of the models without the padding."""
    folders = {}
    for kind, widths in (("exact", (0, 0)), ("padded", (8, 24))):
        models = [padded(causal_teacher, rows, tmp_path / f"{kind} {number}") for number, rows in enumerate(widths)]
        run = with_teachers("dwt-clm", text, models[0], "steps=3", "log.every=1", "precision=float32")
        student = {"path": str(models[1]), "weight_decay": 0.0}
        tree = to_dict(run)
        tree["members"]["large"] = student
        folders[kind] = train(load(tree), tmp_path / kind)
    exact, cut = (read_metrics(folders[kind] / "metrics.jsonl") for kind in ("exact", "padded"))
    for one, other in zip(exact, cut, strict=True):
        if "held_out" in one:
            assert one["held_out"]["weak"]["loss"] == pytest.approx(other["held_out"]["weak"]["loss"], rel=1e-6)
        else:
            assert one["large/hard"] == pytest.approx(other["large/hard"], rel=1e-5)
            assert one["large/from_weak"] == pytest.approx(other["large/from_weak"], rel=1e-3, abs=1e-6)
    before, after = weights(folders["exact"]), weights(folders["padded"])
    name = "large/model.embed_tokens.weight"
    assert len(after[name]) == len(before[name]) + 24
    assert (after[name][-24:] == 50).all()
    torch.testing.assert_close(after[name][:-24], before[name], rtol=0, atol=1e-5)


def test_another_tokenizer_is_refused_with_the_first_tokens_that_differ(text, causal_teacher, tmp_path):
    own = json.loads((causal_teacher / "tokenizer.json").read_text())
    ids = own["model"]["vocab"]
    by_id = {number: token for token, number in ids.items()}
    ids[by_id[20]], ids[by_id[21]] = 21, 20
    other = shutil.copytree(causal_teacher, tmp_path / "other")
    (other / "tokenizer.json").write_text(json.dumps(own))
    tree = to_dict(with_teachers("dwt-clm", text, other))
    tree["data"]["tokenizer"] = str(causal_teacher)
    message = f"2 tokens differ, as {by_id[20]!r} is id 21 in the one and 20 in the other, {by_id[21]!r} is id 20 in"
    refused(re.escape(message), load(tree), tmp_path / "run")


def test_a_model_of_fewer_tokens_than_the_tokenizer_is_refused(text, causal_teacher, tmp_path):
    small = padded(causal_teacher, -5, tmp_path / "small")
    refused(
        r"members.weak.path: the model knows 74 tokens, the tokenizer 79",
        with_teachers("dwt-clm", text, small),
        tmp_path / "run",
    )


def test_adapters_and_quantized_models_are_refused(text, causal_teacher, tmp_path):
    adapter = shutil.copytree(causal_teacher, tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text("{}")
    refused(
        "is an adapter .LoRA, PEFT., which is not supported", with_teachers("dwt-clm", text, adapter), tmp_path / "run"
    )
    narrow = shutil.copytree(causal_teacher, tmp_path / "narrow")
    config = json.loads((narrow / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (narrow / "config.json").write_text(json.dumps(config))
    refused("is quantized .bitsandbytes., which is not", with_teachers("dwt-clm", text, narrow), tmp_path / "run")


def test_live_models_with_adapters_or_narrow_weights_are_refused():
    narrow = predictor("llama").model
    narrow.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.ones(3, dtype=torch.int8), False)
    with pytest.raises(UserError, match=r"LlamaForCausalLM: a model in 8 or 4 bits .*weight torch.int8"):
        Predictor(narrow, 60)
    adapted = predictor("gpt2").model
    adapted.peft_config = {}
    with pytest.raises(UserError, match="GPT2LMHeadModel: a model with an adapter"):
        Predictor(adapted, 60)


@pytest.mark.parametrize("way", ["depth: stack", "learned: 2"])
def test_a_causal_member_grows_from_another(way, text, causal_teacher):
    run = small_run("standalone-clm", text, "precision=float32", "data.tokenizer=null", "data.within_documents=true")
    tree = override(
        to_dict(run), ["members.large.model.layers=4", f"members.large.init={{from: {causal_teacher}, {way}}}"]
    )
    built = build(load(tree), torch.device("cpu"))
    source = AutoModelForCausalLM.from_pretrained(causal_teacher).state_dict()
    found = built.models["large"].state_dict()
    same = torch.equal(found["model.layers.2.mlp.up_proj.weight"], source["model.layers.0.mlp.up_proj.weight"])
    assert same == (way == "depth: stack")
    assert all(torch.isfinite(value) for value in built.cohort.step(0, built.batches.at(0)).values())
