"""Short attention in bfloat16 on a CPU: PyTorch's function, no less exact, and only where it is meant to be."""

import threading
from itertools import product

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, masking_utils

from codistill import attention as short
from codistill.data.packing import document_mask
from codistill.families import FAMILIES
from codistill.families.masked import MASKED
from cohorts import VOCABULARY, Looks, predictor


class Layer(torch.nn.Module):
    """What transformers hands to an attention function beside the tensors."""

    def __init__(self, is_causal: bool = False):
        super().__init__()
        self.is_causal = is_causal


def drawn(heads: int, key_heads: int, queries: int = 9, keys: int = 9, width: int = 8):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, queries, width), (2, key_heads, keys, width), (2, key_heads, keys, width)]
    return [torch.randn(*s, generator=generator).bfloat16().requires_grad_() for s in shapes]


def with_gradients(function, tensors, weight):
    out = function(*tensors)
    return [out, *torch.autograd.grad((out.double() * weight).sum(), tensors)]


MASKS = {
    "none": None,
    "padding": torch.arange(9)[None, None, None] < torch.tensor([9, 5])[:, None, None, None],
    "window": ((torch.arange(9)[:, None] - torch.arange(9)).abs() <= 2)[None, None],
    "added": torch.where(torch.arange(9) < 6, 0.0, -1e4).bfloat16()[None, None, None],
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("key_heads", "causal"), [(4, False), (4, True), (2, True)])
def test_it_is_no_further_from_float64_than_pytorch(mask, key_heads, causal):
    tensors, given = drawn(4, key_heads), MASKS[mask]
    weight = torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def pytorch(q, k, v):
        k, v = (x.repeat_interleave(4 // key_heads, 1) for x in (k, v))
        added = given.to(q.dtype) if given is not None and given.dtype != torch.bool else given
        return scaled_dot_product_attention(q, k, v, attn_mask=added, is_causal=causal and given is None)

    def ours(q, k, v):
        out, none = short.attention(Layer(causal), q, k, v, given)
        assert none is None
        return out.transpose(1, 2)

    exact = with_gradients(pytorch, [x.detach().double().requires_grad_() for x in tensors], weight)
    theirs, found = with_gradients(pytorch, tensors, weight), with_gradients(ours, tensors, weight)
    for name, e, t, f in zip(("out", "query", "key", "value"), exact, theirs, found, strict=True):
        error, allowed = (f - e).norm() / e.norm(), (t - e).norm() / e.norm()
        assert error <= 1.5 * allowed + 1e-3, name


def test_what_is_not_short_and_bfloat16_goes_to_pytorch(monkeypatch):
    asked = []
    monkeypatch.setattr(short, "sdpa_attention_forward", lambda *given, **_: asked.append(given[1].shape))
    q, k, v = drawn(2, 2)
    short.attention(Layer(), *(x.float() for x in (q, k, v)), None)
    assert len(asked) == 1
    long = [torch.zeros(1, 1, short.LONGEST + 1, 4, dtype=torch.bfloat16)] * 3
    short.attention(Layer(), *long, None)
    assert len(asked) == 2
    short.attention(Layer(), q, k, v, None, softcap=30.0)
    assert len(asked) == 3


def test_dropout_drops_weights_and_keeps_their_mean():
    q, k, v = drawn(2, 2, keys=200)
    v = torch.ones_like(v)
    torch.manual_seed(0)
    out, _ = short.attention(Layer(), q, k, v, None, dropout=0.5)
    assert out.float().std() > 0.01
    assert out.float().mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(short.attention(Layer(), q, k, v, None)[0], torch.ones_like(out))


SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
}
MODELS = {
    "bert": lambda: BertForMaskedLM(BertConfig(**SHAPE)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **SHAPE)),
}


@pytest.mark.parametrize("family", MODELS)
def test_a_model_gives_the_same_logits_and_a_causal_one_looks_only_back(family, monkeypatch):
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    ids = torch.randint(50, (3, 12))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model(input_ids=ids).logits
        short.use_short_attention(model)
        monkeypatch.delattr(short, "sdpa_attention_forward")
        after = model(input_ids=ids).logits
        assert (after - before).abs().max() < 0.02 * before.abs().max()
        if family == "llama":
            changed = ids.clone()
            changed[:, 6:] = (ids[:, 6:] + 1) % 50
            assert torch.equal(model(input_ids=changed).logits[:, :6], after[:, :6])


def test_a_chosen_implementation_stays():
    model = MODELS["bert"]()
    model.set_attn_implementation("eager")
    short.use_short_attention(model)
    assert model.config._attn_implementation == "eager"


# ---- masks without a look at values ------------------------------------------------------------


CUDA = torch.device("cuda")


def packed(length: int = 16) -> dict[str, torch.Tensor]:
    ids = torch.randint(VOCABULARY, (3, length), generator=torch.Generator().manual_seed(2))
    starts = torch.tensor([[0, 0], [0, 5], [0, 11]])
    places = torch.arange(length)
    return {"input_ids": ids, "position_ids": torch.where(places < starts[:, 1:], places, places - starts[:, 1:])}


def padded(length: int = 16) -> dict[str, torch.Tensor]:
    shown = torch.arange(length) < torch.tensor([[16], [9], [4]])
    return {"input_ids": packed()["input_ids"], "attention_mask": shown.long()}


CASES = {
    "one text a row": lambda: {"input_ids": packed()["input_ids"]},
    "several texts a row": packed,
    "padding": padded,
    "a mask that hides nothing": lambda: padded() | {"attention_mask": torch.ones(3, 16, dtype=torch.int64)},
}


@pytest.mark.parametrize(
    ("family", "case"),
    # A DeBERTa cannot be told which positions are whose, and is refused (`check_documents`).
    [pair for pair in product(FAMILIES, CASES) if pair != ("deberta-v2", "several texts a row")],
)
def test_masks_that_are_made_unread_say_the_same(family, case, monkeypatch):
    inputs = CASES[case]()
    if case == "several texts a row" and family in MASKED:
        inputs["attention_mask"] = torch.from_numpy(document_mask(inputs["position_ids"].numpy()))
    model = predictor("one", 2, family=family, dropout=0.0).eval()
    model.model.config.pad_token_id = 0  # as a run's tokenizer gives it
    shown = inputs["attention_mask"] if case == "padding" else torch.ones(3, 16)
    rows_N = shown.flatten().nonzero()[:, 0]
    wanted = model(inputs, rows_N)
    monkeypatch.setattr("codistill.models.unread_masks", lambda inputs, _: short.unread_masks(inputs, CUDA))
    with Looks() as looks:
        found = model(inputs, rows_N)
    assert looks.found == []
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_what_a_thread_is_told_of_its_rows_is_its_own():
    """Two passes that overlap, on threads of their own, and a third that is told nothing."""
    inside, told = threading.Barrier(2), {}

    def one(name, inputs):
        with short.unread_masks(inputs, CUDA):
            inside.wait()
            told[name] = masking_utils.find_packed_sequence_indices(packed()["position_ids"]) is None
            inside.wait()

    threads = [
        threading.Thread(target=one, args=("plain", {})),
        threading.Thread(target=one, args=("packed", packed())),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == {"plain": True, "packed": False}
    assert masking_utils.find_packed_sequence_indices(packed()["position_ids"]) is not None
