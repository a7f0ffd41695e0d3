"""Fine-tuning data with other words (studies/ctcd-combined/augmented): what is replaced, by what, how often."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).parents[1] / "studies" / "ctcd-combined" / "augmented"
WORDS = ["the", "cat", "sat", "on", "mat", "a", "dog", "ran", "far", *(f"w{chr(97 + n)}" for n in range(20))]
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "play", "##ing", *WORDS]


def script(name: str) -> ModuleType:
    """A module of the study's own folder."""
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


@pytest.fixture(scope="module")
def subject() -> SimpleNamespace:
    """A model that likes the token after the one to the left of the mask best, then the next after that, and so on;
    it fails where more or less than one token is masked, or one that is not there is read."""
    tokenizer = Tokenizer(models.WordPiece({token: n for n, token in enumerate(TOKENS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    roles = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}

    def model(input_ids, attention_mask):
        assert ((input_ids == 4).sum(1) == 1).all()
        assert ((input_ids != 0) == attention_mask.bool()).all()
        left_BT = input_ids.roll(1, dims=1)
        token_V = torch.arange(len(TOKENS))
        return SimpleNamespace(logits=-((token_V - left_BT[..., None] - 1) % len(TOKENS)).float())

    model.config = SimpleNamespace(vocab_size=len(TOKENS))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", **roles)
    return SimpleNamespace(model=model, tokenizer=wrapped)


def test_words_of_one_token_have_their_likeliest_replacements(subject):
    sentences = ["The cat, playing on.", "a dog ran far"]
    first, second = script("words").replaceable(sentences, subject)
    # Neither what stands for punctuation, nor a word of two tokens, nor where sentences of other lengths stand.
    assert [sentences[0][begin:end] for begin, end, _ in first] == ["The", "cat", "on"]
    assert [sentences[1][begin:end] for begin, end, _ in second] == sentences[1].split()
    after = lambda token: [w for w in TOKENS[TOKENS.index(token) + 1 :] + TOKENS if w in ("play", *WORDS)][:15]  # noqa: E731
    assert [words for _, _, words in first] == [after("[CLS]"), after("the"), after("##ing")]
    assert second[3][2] == after("ran")


def test_a_copy_has_two_words_in_five_replaced_and_all_else_kept(subject):
    sentences = ["The cat, playing on.", "a dog ran far"] * 40
    module = script("words")
    copies = module.augmented(sentences, subject, copies=10, seed=0)
    assert copies == module.augmented(sentences, subject, copies=10, seed=0)
    assert copies != module.augmented(sentences, subject, copies=10, seed=1)
    assert [len(each) for each in copies] == [10] * 80
    assert all(", playing " in copy and copy.endswith(".") for each in copies[::2] for copy in each)
    changed = [
        new != old
        for sentence, each in zip(sentences[1::2], copies[1::2], strict=True)
        for copy in each
        for old, new in zip(sentence.split(), copy.split(), strict=True)
    ]
    # One of the 15 may be the word itself, so a little less than 0.4; the bound is five standard errors.
    assert 0.4 * 14 / 15 - 0.05 < np.mean(changed) < 0.4 + 0.05


def test_differences_are_paired_by_seed():
    """Contrasts of made-up scores, against Student's t by hand."""
    run = script("run")
    arms = {arm for contrast in run.CONTRASTS for arm in contrast}
    cells = [
        {"seed": seed, "text": text, "way": way, "member": member, "failed": None, "steps": 500,
         "score": 0.5 + seed / 10 + (way == "both") * (0.02 + 0.01 * seed)}
        for text, way, member in sorted(arms) for seed in range(3)
    ]  # fmt: skip
    table = run.table_of({"cells": cells})
    # Differences of 2, 3 and 4 points: mean 3, sd 1, t(0.975, 2) = 4.303, so ± 4.303 / √3.
    assert "| plain both small − plain one-way small | 3 | +3.00 | [+0.52, +5.48] | higher |" in table
    assert "| plain one-way small − plain alone small | 3 | +0.00 | [+0.00, +0.00] | not shown |" in table
    assert "| plain | alone | small | 3 | 60.0 ± 10.0 |" in table


def test_the_committed_table_is_made_from_the_committed_scores():
    run, found = script("run"), json.loads((FOLDER / "results.json").read_text())
    assert run.table_of(found) in (FOLDER / "README.md").read_text()
    assert {cell["steps"] for cell in found["cells"] if not cell["failed"]} == {500}
