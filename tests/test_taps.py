"""What edges below the logits see, against what transformers itself says and computes."""

import pytest
import torch
import transformers
from torch import nn
from torch.optim import SGD
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from codistill.cohort import Cohort, Distillation, Member
from codistill.config import Layers
from codistill.errors import UserError
from codistill.families import FAMILIES
from codistill.models import Predictor
from codistill.taps import Tap, Taps
from cohorts import SIZE, VOCABULARY, batch, predictor

_DEEP = SIZE | {"num_hidden_layers": 3}
_CAUSAL = {key: value for key, value in _DEEP.items() if key != "pad_token_id"}
_GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 40}
_XLM = {"vocab_size": VOCABULARY, "emb_dim": 32, "n_layers": 3, "n_heads": 4, "max_position_embeddings": 40}
BY_PROOF = {
    "xlm-roberta": transformers.XLMRobertaConfig(**_DEEP),
    "mpnet": transformers.MPNetConfig(**_DEEP),
    "mistral": transformers.MistralConfig(**_CAUSAL, num_key_value_heads=1),
    "openai-gpt": transformers.OpenAIGPTConfig(**_GPT),
}


def made(config, seed: int = 0) -> Predictor:
    torch.manual_seed(seed)
    masked = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    kind = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    return Predictor(kind.from_config(config), VOCABULARY)


def new(name: str, seed: int) -> Predictor:
    built = made(BY_PROOF[name], seed) if name in BY_PROOF else predictor("a", 3, family=name, seed=seed)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return built


def cohort_of(teacher: Predictor, student: Predictor, **edge) -> Cohort:
    learner = Member("small", student, SGD(student.parameters(), lr=0.1))
    return Cohort([Member("large", teacher), learner], [Distillation("large", "small", **edge)])


@pytest.mark.parametrize("name", [*FAMILIES, *BY_PROOF])
def test_a_layers_state_is_what_transformers_calls_its_hidden_state(name):
    predictors, given = [new(name, seed) for seed in (0, 1)], batch(3)
    cohort = cohort_of(*predictors, kind="hidden", layers=Layers(student=[1, 2], teacher=[2, 1]))
    models = [built.model.eval() for built in predictors]
    with torch.no_grad():
        teacher, student = (model(**given.inputs, output_hidden_states=True).hidden_states for model in models)
    expected = (student[1] - teacher[2]).square().mean() + (student[2] - teacher[1]).square().mean()
    loss = cohort.gradients(0, given)["small/hidden_from_large"].item()
    assert loss == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("kind", ["XLM", "Flaubert"])
def test_a_model_whose_first_list_is_not_its_layers_is_refused(kind, layers):
    built = made(getattr(transformers, f"{kind}Config")(**_XLM | {"n_layers": layers}))
    with pytest.raises(UserError, match=r"'large': .*WithLMHeadModel has no list of layers that are known") as refusal:
        cohort_of(built, predictor("b"), kind="hidden")
    assert "\n" not in str(refusal.value)


def test_one_layer_alone_is_seen_too():
    one = transformers.MistralConfig(**_CAUSAL | {"num_hidden_layers": 1}, num_key_value_heads=1)
    assert len(made(one).layers) == 1


def test_a_model_that_comes_with_features_of_its_own_is_proven_when_an_edge_asks():
    def parts(built: Predictor) -> Predictor:
        output = built.model.get_output_embeddings()
        return Predictor.from_module(built.model, built._parts.features, output, vocabulary=VOCABULARY)

    cohort_of(*(parts(new("mistral", seed)) for seed in (0, 1)), kind="hidden")
    with pytest.raises(UserError, match="XLMWithLMHeadModel has no list of layers"):
        cohort_of(parts(made(transformers.XLMConfig(**_XLM))), predictor("b"), kind="hidden")


class Spied:
    """What goes into a model's attention function, layer by layer."""

    def __init__(self, model: nn.Module):
        self.seen = []
        AttentionInterface.register("spied", self)
        model.config._attn_implementation = "spied"

    def __call__(self, module, query, key, value, *rest, **more):
        self.seen.append([heads.transpose(1, 2).flatten(2) for heads in (query, key, value)])
        return sdpa_attention_forward(module, query, key, value, *rest, **more)


@torch.no_grad()
def test_gpt2s_queries_keys_and_values_are_what_its_attention_gets():
    built, given = new("gpt2", 0), batch(3)
    taps, spied = Taps(built.model, built.layers, "a"), Spied(built.model)
    with taps.open([Tap("relation", 2)]) as kept:
        built.model.eval()(**given.inputs, use_cache=False)
    for number, vectors_BTD in enumerate(spied.seen[1]):
        assert torch.equal(kept[Tap("relation", 2)][number], vectors_BTD)


@pytest.mark.parametrize("multi_query", [False, True])
def test_projections_of_one_that_are_cut_otherwise_are_refused_by_name(multi_query):
    """GPTBigCode calls it as GPT-2 does, and lays it out head by head, or with one head of keys and values."""
    built = made(transformers.GPTBigCodeConfig(**_GPT, multi_query=multi_query))
    with pytest.raises(UserError, match="'large': where layer 3 of a gpt_bigcode has queries, keys and values is not"):
        cohort_of(built, predictor("b", family="gpt2"), kind="relation")


class LayersOfTheirOwn:
    """As a transformers configuration whose layers have different numbers of heads, where it is asked for one."""

    model_type, hidden_size = "own", 32

    @property
    def num_attention_heads(self):
        raise RuntimeError("'num_attention_heads' is a per-layer attribute")


@pytest.mark.parametrize("config", [LayersOfTheirOwn(), transformers.PreTrainedConfig(hidden_size=32)])
def test_heads_that_a_configuration_does_not_say_are_asked_for(config):
    model = made(BY_PROOF["mistral"]).model
    model.config = config
    taps = Taps(model, model.model.layers, "small")
    assert (taps.width, taps.widths(1)) == (32, [32, 16, 16])
    with pytest.raises(UserError, match=r"^member 'small': how many heads its layers have is not known; give relation"):
        _ = taps.heads
