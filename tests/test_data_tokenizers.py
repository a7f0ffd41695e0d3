"""Tokenizers: a vocabulary file is enough, training is deterministic, what masking knows of them is right."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

from codistill.data.tokenizers import (
    Vocabulary,
    encoder_of,
    load_tokenizer,
    parse_training_spec,
    tokenizer_hash,
    train_tokenizer,
    vocabulary_size,
)
from codistill.errors import UserError
from data_examples import VOCABULARY, documents, vocabulary_file


@pytest.fixture
def tokenizer(tmp_path):
    return load_tokenizer(str(vocabulary_file(tmp_path)))


def test_vocabulary_file_alone_follows_berts_rules(tokenizer):
    words = ["[CLS]", "the", "cat", ",", "u", "##b", "##e", "##r", "!", "[UNK]", "[SEP]"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("The Cat,\tÜber! €").input_ids) == words
    assert tokenizer.decode(tokenizer("the cat, uber!").input_ids, skip_special_tokens=True) == "the cat, uber!"
    assert tokenizer.mask_token == "[MASK]"
    assert tokenizer("a", "b").input_ids == [VOCABULARY.index(t) for t in ("[CLS]", "a", "[SEP]", "b", "[SEP]")]


def test_cased_vocabulary_file_keeps_capitals(tmp_path):
    (tmp_path / "cased.txt").write_text("\n".join([*VOCABULARY, "Cat"]))
    assert load_tokenizer(tmp_path / "cased.txt").tokenize("Cat cat") == ["Cat", "cat"]


def test_saved_tokenizer_loads_as_the_same(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again("the old stonebridge.").input_ids == tokenizer("the old stonebridge.").input_ids
    assert tokenizer_hash(again) == tokenizer_hash(tokenizer)


def test_hash_is_of_the_token_map_alone(tokenizer, tmp_path):
    pairs = [[token, i] for i, token in enumerate(VOCABULARY)]
    before = tokenizer_hash(tokenizer)
    assert before == hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
    tokenizer.chat_template, tokenizer.padding_side = "{{ messages }}", "left"
    assert tokenizer_hash(tokenizer) == before
    (tmp_path / "other.txt").write_text("\n".join([*VOCABULARY[:-2], VOCABULARY[-1], VOCABULARY[-2]]))
    assert tokenizer_hash(load_tokenizer(tmp_path / "other.txt")) != before


def test_vocabulary_counts_added_tokens_and_holes(tokenizer):
    assert vocabulary_size(tokenizer) == len(VOCABULARY)
    tokenizer.add_tokens(["<extra>"])
    assert vocabulary_size(tokenizer) == len(VOCABULARY) + 1


def test_what_masking_knows(tokenizer):
    vocabulary = Vocabulary.of(tokenizer)
    assert (vocabulary.pad, vocabulary.start, vocabulary.separator, vocabulary.mask) == (0, 2, 3, 4)
    assert np.flatnonzero(vocabulary.special_V).tolist() == [0, 1, 2, 3, 4]
    assert vocabulary.ordinary.tolist() == list(range(5, len(VOCABULARY)))
    assert [VOCABULARY[i] for i in np.flatnonzero(vocabulary.continues_V)] == [t for t in VOCABULARY if t[:2] == "##"]


def test_byte_level_words_start_at_their_blank(tmp_path):
    bpe = train_tokenizer("bpe", 400, documents(40))
    vocabulary, ids = Vocabulary.of(bpe), bpe("the cat sat", add_special_tokens=False).input_ids
    starts = [not vocabulary.continues_V[i] for i in ids]
    tokens = bpe.convert_ids_to_tokens(ids)
    assert starts == [token.startswith("Ġ") for token in tokens]
    assert bpe.decode(bpe("the cät\n\nsat", add_special_tokens=False).input_ids) == "the cät\n\nsat"


def test_folder_of_vocabulary_and_merges(tmp_path):
    bpe = train_tokenizer("bpe", 300, documents(40))
    bpe.backend_tokenizer.model.save(str(tmp_path))
    again = load_tokenizer(tmp_path)
    assert again("the cat", add_special_tokens=False).input_ids == bpe("the cat", add_special_tokens=False).input_ids


def test_special_tokens_spelled_out_in_a_text_are_text(tokenizer):
    ids = encoder_of(tokenizer).encode("a [SEP] b [MASK]", add_special_tokens=False).ids
    assert tokenizer.sep_token_id not in ids
    assert tokenizer.mask_token_id not in ids


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_training_is_equal_in_every_process(kind):
    code = (
        "from data_examples import documents; from codistill.data.tokenizers import *\n"
        f"print(tokenizer_hash(train_tokenizer({kind!r}, 500, documents(200))))"
    )
    path = json.dumps(sys.path)
    script = f"import sys, json; sys.path[:] = json.loads({path!r})\n{code}"
    hashes = {
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
        for _ in range(2)
    }
    assert hashes == {tokenizer_hash(train_tokenizer(kind, 500, documents(200))) + "\n"}


def test_trained_wordpiece_has_the_size_and_no_unknown(tmp_path):
    texts = documents(200)
    trained = train_tokenizer("wordpiece", 200, texts)
    assert vocabulary_size(trained) == 200
    assert trained.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert all(trained.unk_token_id not in ids for ids in trained(texts).input_ids)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "nowhere/to/be/found",
            "found: there is no such folder here; give a tokenizer folder, a vocabulary file or a hub name",
        ),
        ("./nowhere", "there is no such folder here; give a tokenizer folder"),
        ("somebody/nowhere", "there is no such folder here, and the hub gives none .*; give a tokenizer folder"),
        ("empty", "no tokenizer can be read there .*; give a tokenizer folder"),
        ("words.txt", r"no \[UNK\] and no \[SEP\] among its 2 lines"),
        ("binary.txt", "not a readable vocabulary file"),
        ("broken", "make no byte-level BPE"),
        ("a-model", "it has no vocabulary; name the tokenizer that the model was trained with"),
    ],
)
def test_what_is_no_tokenizer_is_refused(spec, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "words.txt").write_text("hello\nworld\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "broken").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken" / "merges.txt").write_text("a b")
    (tmp_path / "a-model").mkdir()
    (tmp_path / "a-model" / "config.json").write_text('{"model_type": "bert", "vocab_size": 1000}')
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(spec)
    assert spec in str(caught.value)
    assert "Repo id" not in str(caught.value)


@pytest.mark.parametrize("spec", ["train:wordpiece", "train:wordpiece:many", "train:bpe:32:1"])
def test_malformed_training_spec(spec):
    with pytest.raises(UserError, match="wanted train:KIND:SIZE"):
        parse_training_spec(spec)


def test_unknown_kind_and_small_size():
    with pytest.raises(UserError, match="unknown kind"):
        train_tokenizer("unigram", 1000, [])
    with pytest.raises(UserError, match="at least 261"):
        train_tokenizer("bpe", 100, [])
