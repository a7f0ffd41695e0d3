"""Families of models: cut before the output embedding, saved and loaded, trained together, or refused by name."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from torch.nn import functional
from torch.optim import SGD

from codistill.cohort import Cohort, Distillation, Member
from codistill.config import ModelConfig
from codistill.errors import UserError
from codistill.families import FAMILIES, family_of, layers_of, longest, split
from codistill.families.family import Chain
from codistill.families.found import Bypass
from codistill.loading import load, to_dict
from codistill.models import Predictor, check_documents_apart, load_model, new_model
from codistill.plan import plan
from codistill.schedules import constant
from codistill.train import train
from cohorts import LENGTH, SIZE, VOCABULARY, assert_same_bits, batch, member, parameters, predictor
from evaluations import model_folder
from runs import refused, small_run

CONFIGURED = ("bert", "modernbert", "roberta", "distilbert", "electra", "deberta-v2")
# As their published weights are, where that is not how we configure them; and families that no table knows.
PUBLISHED = {
    "electra small": transformers.ElectraConfig(**SIZE, embedding_size=16),
    "deberta-v2 legacy": transformers.DebertaV2Config(**SIZE, position_biased_input=True, type_vocab_size=2),
    "deberta-v2 legacy narrow": transformers.DebertaV2Config(**SIZE, embedding_size=16, relative_attention=True),
    "xlm-roberta": transformers.XLMRobertaConfig(**SIZE),
    "albert": transformers.AlbertConfig(**SIZE, embedding_size=16),
    "mpnet": transformers.MPNetConfig(**SIZE),
    "eurobert": transformers.EuroBertConfig(**SIZE),
}


def new(name: str, seed: int = 0) -> Predictor:
    if name in CONFIGURED:
        return predictor(name, 2, family=name, dropout=0.0, seed=seed)
    torch.manual_seed(seed)
    return Predictor(transformers.AutoModelForMaskedLM.from_config(PUBLISHED[name]), VOCABULARY)


def shaken(built: Predictor) -> Predictor:
    """With no bias at 0 and no scale at 1, in evaluation mode."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    return built.eval()


def test_every_family_of_the_table_can_be_configured():
    assert set(CONFIGURED) == {name for name, family in FAMILIES.items() if family.objective == "mlm"}


_AS_BERT = {"hidden_dropout_prob", "attention_probs_dropout_prob"}
DROPOUTS = {
    "bert": _AS_BERT,
    "modernbert": {"embedding_dropout", "attention_dropout", "mlp_dropout"},
    "roberta": _AS_BERT,
    "distilbert": {"dropout", "attention_dropout"},
    "electra": _AS_BERT,
    "deberta-v2": _AS_BERT,
    "gpt2": {"embd_pdrop", "attn_pdrop", "resid_pdrop"},
    **{name: {"attention_dropout"} for name in ("llama", "qwen2", "qwen3", "gemma3_text")},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_of_a_new_model_is_at_every_place_where_its_family_has_one(family):
    """But not in heads that classify, which a language model lacks."""
    with torch.device("meta"):
        built = predictor("a", family=family, dropout=0.375).model
    assert {name for name, value in built.config.to_dict().items() if value == 0.375} == DROPOUTS[family]
    assert {module.p for module in built.modules() if isinstance(module, torch.nn.Dropout)} <= {0.375}


GATED = ("modernbert", "llama", "qwen2", "qwen3", "gemma3_text")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("feed_forward", [None, 40])
def test_a_new_models_layer_is_as_large_as_its_settings_say(family, feed_forward):
    """The numbers in its matrices: gated feed-forward layers have three; key-value heads are half where they may be."""
    shared = 1 if FAMILIES[family].objective == "clm" and family != "gpt2" else None
    config = ModelConfig(family=family, width=32, heads=2, feed_forward=feed_forward, key_value_heads=shared, layers=1)
    with torch.device("meta"):
        layer = layers_of(new_model(config, vocabulary=50, length=16, tokenizer=None, seed=0, name="a"))[0]
    usual = {"modernbert": 48} | dict.fromkeys(GATED[1:], 96)
    rows = 32 * (feed_forward or usual.get(family, 128)) * (3 if family in GATED else 2)
    attention = 32 * 32 * 4 if shared is None else 32 * 32 * 3
    assert sum(weight.numel() for weight in layer.parameters() if weight.ndim == 2) == rows + attention


def test_gemmas_attention_is_scaled_by_the_width_of_its_heads():
    with torch.device("meta"):
        built = predictor("a", family="gemma3_text").model
    assert {part.scaling for part in built.modules() if hasattr(part, "scaling")} == {16**-0.5}


@pytest.mark.parametrize("name", [*CONFIGURED, *PUBLISHED])
@torch.no_grad()
def test_features_times_output_embedding_are_the_models_own_logits(name):
    built, given = shaken(new(name)), batch(3)
    expected_NV = built.model(**given.inputs).logits.flatten(0, 1)[given.rows_N]
    features_ND = built(given.inputs, given.rows_N)
    logits_NV = functional.linear(features_ND, built.output_weight, built.output_bias)
    torch.testing.assert_close(logits_NV, expected_NV, rtol=0, atol=1e-6 * expected_NV.abs().max().item())
    known = name in CONFIGURED or "legacy" in name or "electra" in name
    assert isinstance(split(built.model).features, Chain if known else Bypass)


def skip_where_transformers_cannot_load_deberta() -> None:
    if Version(transformers.__version__) < Version("5.20"):
        pytest.skip("transformers before 5.20 does not load a DeBERTa with the newer head")


@pytest.mark.parametrize("name", [*CONFIGURED, *PUBLISHED])
def test_saving_and_loading_loses_nothing(name, tmp_path):
    if name == "deberta-v2":
        skip_where_transformers_cannot_load_deberta()
    built = shaken(new(name))
    built.model.save_pretrained(tmp_path / "model")
    again = Predictor(load_model(str(tmp_path / "model"), "members.a.path"), VOCABULARY).eval()
    before, after = built.model.state_dict(), again.model.state_dict()
    assert before.keys() == after.keys()
    assert_same_bits(list(before.values()), list(after.values()))
    given = batch(3)
    assert_same_bits([built(given.inputs, given.rows_N)], [again(given.inputs, given.rows_N)])


@pytest.mark.parametrize("name", [*CONFIGURED, *PUBLISHED])
def test_one_step_of_co_distillation_runs_and_its_gradient_is_the_plain_models(name):
    built, plain = new(name), new(name).model.eval()
    mine = Member(name, built, SGD(built.parameters(), lr=0.0), lr=constant(1.0), clip=1e9)
    other = member("other", dropout=0.0)
    cohort = Cohort([mine, other], [Distillation(name, "other"), Distillation("other", name)])
    built.eval()  # published configurations have dropout
    teacher, given, before = predictor("other", dropout=0.0), batch(3), parameters(cohort, name)
    metrics = cohort.step(0, [given])
    logits_NV = plain(**given.inputs).logits.flatten(0, 1)[given.rows_N]
    target_NV = teacher.model(**given.inputs).logits.flatten(0, 1)[given.rows_N].softmax(-1).detach()
    soft = functional.kl_div(logits_NV.log_softmax(-1), target_NV, reduction="batchmean")
    (functional.cross_entropy(logits_NV, given.labels_N) + soft).backward()
    assert metrics[f"{name}/from_other"].item() == pytest.approx(soft.item(), rel=1e-4)
    for old, now, parameter in zip(before, parameters(cohort, name), plain.parameters(), strict=True):
        gradient = torch.zeros_like(old) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(old - now, gradient, rtol=1e-3, atol=1e-6)


def test_a_run_of_new_families_is_configured_loaded_and_resumed_by_name(text, tmp_path):
    run = small_run("ctcd", text, "steps=2")
    tree = to_dict(run)
    for name, family in (("large", "deberta-v2"), ("small", "roberta")):
        tree["members"][name]["model"] |= {"family": family}
    tree["members"] = {name: tree["members"][name] for name in ("large", "small")}
    out = train(load(tree), tmp_path / "run")
    taught = small_run("dwt", text, f"members.weak.path={out / 'members' / 'small'}", "steps=2", "data.tokenizer=null")
    train(taught, tmp_path / "taught")
    assert json.loads((tmp_path / "taught" / "results.json").read_text())["members"]["weak"]["loss"] > 0


def test_positions_that_begin_after_padding_are_not_counted(text, tmp_path):
    roberta = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SIZE | {"pad_token_id": 1}))
    assert longest(roberta) == 38
    roberta(input_ids=torch.full((1, 38), 5))
    with pytest.raises((IndexError, RuntimeError)):
        roberta(input_ids=torch.full((1, 39), 5))
    assert longest(predictor("a", family="roberta").model) == 512
    assert longest(predictor("a", family="bert").model) == 512
    built = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SIZE | {"vocab_size": 300, "pad_token_id": 1}))
    built.save_pretrained(tmp_path / "roberta")
    straight = train(small_run("standalone", text, "steps=1"), tmp_path / "with-tokenizer")
    wanted = f"data.tokenizer={straight / 'members' / 'large'}"
    run = small_run("dwt", text, f"members.weak.path={tmp_path / 'roberta'}", "data.length=39", wanted)
    refused("data.length: 39 is more than the 38 positions of members.weak", run, tmp_path / "run")


@pytest.mark.parametrize("name", ["roberta", "xlm-roberta", "bert"])
@torch.no_grad()
def test_positions_that_are_given_count_from_0_in_every_family(name):
    built, given = shaken(new(name)), batch(3)
    ids_BT = given.inputs["input_ids"].clamp_min(1)  # without padding
    numbered = {"input_ids": ids_BT, "position_ids": torch.arange(LENGTH).expand(ids_BT.shape)}
    assert_same_bits([built({"input_ids": ids_BT}, given.rows_N)], [built(numbered, given.rows_N)])


@pytest.mark.parametrize("name", ["bert", "modernbert", "roberta", "distilbert", "electra"])
@torch.no_grad()
def test_documents_apart_are_documents_alone_in_every_family(name):
    """Also where the second is longer than a local layer's window, and the row than both."""
    model = new_model(
        ModelConfig(family=name, layers=4, width=32, heads=2),
        vocabulary=50,
        length=99,
        tokenizer=None,
        seed=0,
        name="a",
    )
    built = shaken(Predictor(model.eval(), 50))
    ids_BT = torch.randint(5, 50, (1, 99))
    ids_BT[0, 9] = 3
    position_BT = torch.cat([torch.arange(10), torch.arange(89)])[None]
    number_BT = (position_BT == 0).cumsum(1)
    inputs = {"input_ids": ids_BT, "position_ids": position_BT}
    inputs["attention_mask"] = number_BT[:, None, :, None] == number_BT[:, None, None, :]
    alone = [built({"input_ids": part}, torch.arange(part.numel())) for part in (ids_BT[:, :10], ids_BT[:, 10:])]
    torch.testing.assert_close(built(inputs, torch.arange(99)), torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_a_family_that_cannot_keep_documents_apart_is_refused(text, tmp_path):
    run = small_run("standalone", text, "data.within_documents=true", "members.large.model.family=deberta-v2")
    refused("members.large is a deberta-v2, which cannot keep documents apart", run, tmp_path / "run")


OTHERS = {
    "opt": transformers.OPTConfig(
        vocab_size=50, hidden_size=32, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=32
    ),
    "bert, as a decoder": transformers.BertConfig(**SIZE, is_decoder=True),
    "convbert": transformers.ConvBertConfig(**SIZE, embedding_size=16),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_by_proof_that_mixes_documents_is_refused(name):
    kind = transformers.AutoModelForMaskedLM if name == "convbert" else transformers.AutoModelForCausalLM
    built = Predictor(kind.from_config(OTHERS[name]), 50)
    with pytest.raises(UserError, match=r"^data.within_documents: members.a is a \w+, which does not keep documents"):
        check_documents_apart(built, "members.a")
    assert built.training


def test_a_model_whose_local_layers_have_windows_of_their_own_is_taken_but_for_whole_masks():
    if "neomme" not in transformers.CONFIG_MAPPING:
        pytest.skip("this transformers has no NeoMME, whose local layers have two windows")
    config = transformers.CONFIG_MAPPING["neomme"](**{**SIZE, "num_hidden_layers": 4, "num_key_value_heads": 1})
    model = transformers.AutoModelForMaskedLM.from_config(config).eval()
    built, given = Predictor(model, VOCABULARY), batch(3)
    logits = model(**given.inputs).logits.flatten(0, 1)[given.rows_N]
    features = built(given.inputs, given.rows_N)
    torch.testing.assert_close(built.logits(features), logits[:, :VOCABULARY], rtol=1e-4, atol=1e-5)
    with pytest.raises(
        UserError, match=r"^members.a: attention_mask: .* have windows of \d+ and \d+; leave data\.within"
    ):
        check_documents_apart(built, "members.a")


@pytest.mark.parametrize("name", ["xlm-roberta", "albert"])
def test_a_model_by_proof_that_keeps_documents_apart_is_taken(name):
    check_documents_apart(new(name), "members.a")


class OwnLlama(transformers.LlamaForCausalLM):
    """A user's own class."""


@torch.no_grad()
def test_a_subclass_of_a_causal_model_keeps_documents_apart():
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    built = Predictor(OwnLlama(transformers.LlamaConfig(vocab_size=50, **size)).eval(), 50)
    ids_BT = torch.randint(50, (1, 12))
    position_BT = torch.cat([torch.arange(5), torch.arange(7)])[None]
    apart = built({"input_ids": ids_BT, "position_ids": position_BT}, torch.arange(5, 12))
    torch.testing.assert_close(apart, built({"input_ids": ids_BT[:, 5:]}, torch.arange(7)), rtol=1e-4, atol=1e-5)


def test_a_run_with_a_model_by_proof_is_planned_and_finished(text, tmp_path):
    """Its FLOPs are counted on fake tensors, where nothing can be proven again."""
    place = model_folder(tmp_path / "xlm")
    transformers.XLMRobertaForMaskedLM(transformers.XLMRobertaConfig(**SIZE | {"vocab_size": 100})).save_pretrained(
        place
    )
    settings = ["steps=2", f"members.large.path={place}", "members.large.model=null", "data.tokenizer=null"]
    run = small_run("standalone", text, *settings, "precision=float32")
    flops = json.loads((train(run, tmp_path / "run") / "results.json").read_text())["members"]["large"]["flops"]
    assert plan(run, torch.device("cpu")).flops["large"] == flops
    assert flops["own"] > 0


def test_a_family_that_counts_from_padding_needs_a_padding_token():
    config, tokenizer = ModelConfig(family="roberta", layers=1, width=32, heads=2), tokenizer_without_padding()
    with pytest.raises(
        UserError, match="roberta counts positions from its padding token, and the tokenizer has none of its"
    ):
        new_model(config, vocabulary=50, length=16, tokenizer=tokenizer, seed=0, name="a")


def tokenizer_without_padding():
    from tokenizers import Tokenizer, models

    plain = Tokenizer(models.WordLevel({"a": 0, "<s>": 1, "</s>": 2, "<mask>": 3}, unk_token="a"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, cls_token="<s>", sep_token="</s>", mask_token="<mask>"
    )


def test_a_model_of_no_known_family_answers_several_threads():
    """Each bypasses the output embedding of the one model; whoever comes between must not see it bypassed."""
    built, given = new("albert").eval(), batch(3)
    with torch.no_grad():
        expected = built(given.inputs, given.rows_N)

    def answer(_):
        with torch.no_grad():
            return built(given.inputs, given.rows_N)

    with ThreadPoolExecutor(4) as pool:
        assert_same_bits(list(pool.map(answer, range(40))), [expected] * 40)
    assert "forward" not in vars(built._parts.output)


@torch.no_grad()
def test_a_causal_model_of_no_known_family_is_cut_where_it_is_proven():
    sizes = {key: value for key, value in SIZE.items() if key != "pad_token_id"}
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes, num_key_value_heads=1)).eval()
    built, given = Predictor(model, VOCABULARY), batch(3)
    expected_NV = model(**given.inputs).logits.flatten(0, 1)[given.rows_N]
    torch.testing.assert_close(built.logits(built(given.inputs, given.rows_N)), expected_NV, rtol=0, atol=1e-6)
    sizes |= {"head_dim": 16, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    sizes |= {"final_logit_softcapping": 30.0}
    for capped in (
        transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes, num_key_value_heads=1)),
        transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes)),
    ):
        with pytest.raises(UserError, match=r"^'gemma\d.*': its logits are not its output embedding's"):
            Predictor(capped, VOCABULARY)


def test_published_deberta_weights_get_their_own_head(tmp_path):
    skip_where_transformers_cannot_load_deberta()
    built = new("deberta-v2")
    built.model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["legacy"]  # as on the hub, where no configuration says which head the weights are for
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = load_model(str(tmp_path), "members.a.path")
    assert family_of(again.config) is FAMILIES["deberta-v2"]
    assert_same_bits(list(built.model.state_dict().values()), list(again.state_dict().values()))


@pytest.mark.parametrize(("value", "count"), [(float("nan"), 1), (float("inf"), 1), (float("-inf"), 2)])
def test_a_model_with_a_weight_that_is_not_finite_is_refused_by_the_tensors_name(value, count, tmp_path):
    tensors = {name: tensor.clone() for name, tensor in new("bert").model.state_dict().items()}
    spoilt = "bert.encoder.layer.1.output.dense.weight"
    tensors[spoilt][3, :count] = value
    new("bert").model.save_pretrained(tmp_path, state_dict=tensors)
    named = rf"^members.old.path: '{tmp_path}': {count} of the 4096 numbers in {spoilt} are NaN or infinite; give"
    with pytest.raises(UserError, match=named) as refusal:
        load_model(str(tmp_path), "members.old.path")
    assert "\n" not in str(refusal.value)


def test_weights_whose_sum_is_too_large_for_float32_are_finite(tmp_path):
    model = new("bert").model
    with torch.no_grad():
        model.cls.predictions.bias[:4] = 3e38
    assert model.cls.predictions.bias.sum().isinf()
    model.save_pretrained(tmp_path)
    load_model(str(tmp_path), "members.a.path")


class Scaled(transformers.BertForMaskedLM):
    """A scale that is 1 when it is made, as if it were not there."""

    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.scale
        return output


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Scaled(transformers.BertConfig(**SIZE)), "^'bert': its logits are not its output embedding's"),
        (transformers.BertModel(transformers.BertConfig(**SIZE)), "^'bert': no output embedding .* BertModel"),
        (torch.nn.Linear(2, 2), "^'Linear': no output embedding .*Predictor.from_module"),
        (
            transformers.EsmForMaskedLM(transformers.EsmConfig(**SIZE, mask_token_id=1)),
            "^'esm': its logits are not its output embedding's",
        ),
        (
            transformers.BartForConditionalGeneration(
                transformers.BartConfig(
                    vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8,
                    decoder_ffn_dim=8, encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=16,
                )
            ),
            "^'bart': an encoder-decoder",
        ),
    ],
    ids=["scaled", "headless", "linear", "esm", "bart"],
)  # fmt: skip
def test_a_model_whose_logits_are_not_proven_is_refused_by_name(model, message):
    with pytest.raises(UserError, match=message) as refusal:
        Predictor(model, VOCABULARY)
    assert "\n" not in str(refusal.value)


CODE = """
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput


class OwnConfig(PreTrainedConfig):
    model_type = "own"

    def __init__(self, vocab_size=50, hidden_size=8, **kwargs):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        super().__init__(**kwargs)


class OwnLM(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        return MaskedLMOutput(logits=self.decoder(self.words(input_ids).cumsum(1).tanh()))
"""


def with_own_code(folder: Path) -> Path:
    folder.mkdir()
    (folder / "own.py").write_text(CODE)
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForMaskedLM": "own.OwnLM"}
    config = {"model_type": "own", "vocab_size": VOCABULARY, "hidden_size": 8, "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config))
    draw = torch.Generator().manual_seed(0)
    shapes = {"words.weight": (VOCABULARY, 8), "decoder.weight": (VOCABULARY, 8), "decoder.bias": (VOCABULARY,)}
    state = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    from safetensors.torch import save_file

    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_models_own_code_runs_only_on_trust(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = str(with_own_code(tmp_path / "own"))
    with pytest.raises(UserError, match=r"^members\.neo\.path: .* members\.neo\.trust_remote_code: true$") as refusal:
        load_model(folder, "members.neo.path")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "modules").exists()
    built = Predictor(load_model(folder, "members.neo.path", trust_remote_code=True), VOCABULARY)
    given = batch(3)
    expected_NV = built.model(**given.inputs).logits.flatten(0, 1)[given.rows_N]
    torch.testing.assert_close(built.logits(built(given.inputs, given.rows_N)), expected_NV, rtol=0, atol=1e-6)
