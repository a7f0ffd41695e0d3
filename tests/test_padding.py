"""A padding token that is also another one, as GPT-2's end of text: it is seen in every text, so it learns."""

import pytest
import torch
import transformers
from torch.nn import functional

from codistill.build import build
from codistill.config import ModelConfig
from codistill.data.tokenizers import own_padding, train_tokenizer, vocabulary_size
from codistill.errors import UserError
from codistill.evaluate.subjects import load_subject
from codistill.families import FAMILIES
from codistill.models import Predictor, load_model, new_model
from cohorts import assert_same_bits
from evaluations import WORDS
from runs import small_run

CPU = torch.device("cpu")
SHARED = {"pad_token": "[SEP]"}


def tokenizer(**change):
    """Of a few words; `change`: the roles of its tokens, where they are not the usual ones."""
    roles = {name: f"[{name[:3].upper()}]" for name in ("pad_token", "cls_token", "sep_token", "unk_token")}
    plain = train_tokenizer("wordpiece", 100, [" ".join(WORDS)] * 3)
    mask = {"mask_token": "[MASK]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain.backend_tokenizer, **roles | mask | change)


def made(family: str, of) -> transformers.PreTrainedModel:
    config = ModelConfig(family=family, layers=1, width=32, heads=2, dropout=0.0)
    return new_model(config, vocabulary=vocabulary_size(of), length=32, tokenizer=of, seed=0, name="a")


def folder(place, of, family: str = "llama"):
    """A model as other people save theirs: the tokenizer's padding token is the configuration's."""
    config = made(family, of).config
    config.pad_token_id = of.pad_token_id
    model = FAMILIES[family].model(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.02)
    model.save_pretrained(place)
    of.save_pretrained(place)
    return place


def slopes(model, token: int, draw: int = 0) -> tuple[float, float]:
    """How fast the loss of rows with `token` in them rises as its embedding moves: by the gradient, and as measured."""
    model = model.double().eval()
    ids = torch.randint(5, 40, (2, 12), generator=torch.Generator().manual_seed(draw))
    ids[:, 4] = ids[:, 9] = token
    weight = model.get_input_embeddings().weight
    along = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss() -> torch.Tensor:
        return functional.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    loss().backward()
    found = (weight.grad[token] @ along).item()
    with torch.no_grad():  # a step that is large beside the rounding of norms, which compute in float32
        weight[token] += 3e-4 * along
        above = loss()
        weight[token] -= 6e-4 * along
        return found, (above - loss()).item() / 6e-4


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "roberta"])
def test_a_new_model_learns_the_token_that_ends_texts_where_it_pads_too(family):
    of = tokenizer(**SHARED)
    model = made(family, of)
    assert model.get_input_embeddings().weight[of.sep_token_id].abs().max() > 0
    found, measured = slopes(model, of.sep_token_id)
    assert found == pytest.approx(measured, rel=2e-2, abs=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "bert", "electra"])
def test_a_loaded_model_learns_the_token_that_ends_texts_where_it_pads_too(family, text, tmp_path):
    of = tokenizer(**SHARED)
    place, clm = folder(tmp_path / "old", of, family), FAMILIES[family].objective == "clm"
    untouched, measured = slopes(load_model(str(place), "a"), of.sep_token_id)
    assert untouched != pytest.approx(measured, rel=1e-2), "as transformers gives it, it is not learned"
    settings = ["data.tokenizer=null", "precision=float32", f"members.large.path={place}", "members.large.model=null"]
    run = small_run("standalone-clm" if clm else "standalone", text, *settings)
    for model in (build(run, CPU).models["large"], load_subject("a", str(place), CPU).model):
        found, measured = slopes(model, of.sep_token_id)
        assert found == pytest.approx(measured, rel=2e-2, abs=1e-3)


def test_a_padding_token_of_its_own_stays_as_it_was(tmp_path):
    of = tokenizer()
    model = made("llama", of)
    assert model.get_input_embeddings().padding_idx == model.config.pad_token_id == of.pad_token_id == 0
    assert not model.get_input_embeddings().weight[0].any()
    loaded = load_subject("a", str(folder(tmp_path, of)), CPU).model
    assert loaded.get_input_embeddings().padding_idx == 0


@pytest.mark.parametrize(
    ("roles", "own"),
    [
        ({}, 0),
        (SHARED, None),
        ({"pad_token": "[CLS]"}, None),
        ({"pad_token": "[UNK]"}, None),
        ({"pad_token": None}, None),
    ],
)
def test_which_token_pads_and_does_nothing_else(roles, own):
    assert own_padding(tokenizer(**roles)) == own
    assert own_padding(None) is None


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_padding_that_learns_adds_nothing(family):
    of = tokenizer(**SHARED)
    model = made(family, of)
    predictor, sep = Predictor(model, vocabulary_size(of)), of.sep_token_id
    ids_BT = torch.tensor([[2, 9, 8, 7, sep, 11, 12, sep]])
    padded_BT = torch.cat([ids_BT, torch.full((1, 5), sep)], 1)
    mask_BT = (torch.arange(13) < 8).long()[None]
    gradients = []
    for inputs in ({"input_ids": ids_BT}, {"input_ids": padded_BT, "attention_mask": mask_BT}):
        if family == "llama":
            inputs.pop("attention_mask", None)  # as `CausalLM` hands it on: padding comes after
        predictor.zero_grad()
        predictor(inputs, torch.arange(7)).square().sum().backward()
        gradients.append(model.get_input_embeddings().weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)
    assert gradients[0][sep].abs().max() > 0


def test_a_new_model_says_what_it_pads_with_and_is_saved_whole(tmp_path):
    of = tokenizer(**SHARED)
    for family in ("llama", "gemma3_text", "modernbert"):
        model = made(family, of)
        model.save_pretrained(tmp_path / family)
        again = load_model(str(tmp_path / family), "a")
        assert again.get_input_embeddings().padding_idx is None
        assert_same_bits(list(model.state_dict().values()), list(again.state_dict().values()))
        if FAMILIES[family].objective == "clm":
            assert again.generation_config.pad_token_id == of.sep_token_id


def test_a_family_that_counts_from_padding_needs_one_of_its_own():
    with pytest.raises(
        UserError, match="roberta counts positions from its padding token, and the tokenizer has none of"
    ):
        made("roberta", tokenizer(**SHARED))
