"""Masked language modelling: how many, which ones, and what is shown, against BERT's rules."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codistill.data.order import keyed
from codistill.data.tokenizers import Vocabulary
from codistill.errors import UserError
from codistill.objectives import MaskedLM

PAD, UNK, CLS, SEP, MASK = range(5)
SIZE = 60
# Ids 40 to 59 continue a word.
SPECIAL_V, CONTINUES_V = np.arange(SIZE) < 5, np.arange(SIZE) >= 40
VOCABULARY = Vocabulary(SIZE, CLS, SEP, PAD, MASK, SPECIAL_V, CONTINUES_V, np.arange(5, SIZE))


def rows(count, length, seed=0, special=0.1):
    chance = np.random.default_rng(seed)
    ids = chance.integers(5, SIZE, (count, length))
    ids[chance.random(ids.shape) < special] = SEP
    ids[:, 0] = CLS
    return ids


def masked(ids, objective, seed=0, lengths=None):
    lengths = np.full(len(ids), ids.shape[1]) if lengths is None else lengths
    return objective.batch(ids, lengths, keyed(seed, np.arange(len(ids))), VOCABULARY)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 140), st.floats(0.01, 0.99), st.booleans(), st.integers(0, 9))
def test_batches_agree_with_the_text(length, rate, whole_word, seed):
    ids = rows(6, length, seed, special=0.3)
    before = ids.copy()
    batch = masked(ids, MaskedLM(rate, whole_word), seed)
    flat = before.reshape(-1)
    assert (ids == before).all()
    assert batch.rows_N.dtype == batch.labels_N.dtype == batch.inputs["input_ids"].dtype == torch.int64
    assert batch.row_weight_N.dtype == torch.float32
    places, filled = batch.rows_N.numpy(), batch.row_weight_N.numpy() == 1
    assert len(set(places)) == places.size
    assert (batch.labels_N.numpy() == flat[places]).all()
    assert not SPECIAL_V[flat[places[filled]]].any()
    changed = np.flatnonzero(batch.inputs["input_ids"].numpy().reshape(-1) != flat)
    assert set(changed) <= set(places[filled])


@pytest.mark.parametrize(
    ("length", "rate", "rows_each"), [(128, 0.15, 19), (128, 0.3, 38), (64, 0.3, 19), (10, 0.01, 1)]
)
def test_every_sequence_has_its_exact_share(length, rate, rows_each):
    batch = masked(rows(8, length), MaskedLM(rate))
    assert MaskedLM(rate).slots(length) == rows_each
    assert np.bincount(batch.rows_N.numpy() // length).tolist() == [rows_each] * 8
    assert batch.row_weight_N.sum() == 8 * rows_each


def test_what_a_sequence_cannot_fill_weighs_nothing():
    ids = rows(4, 20)
    ids[0, 1:] = SEP
    ids[1, 3:] = SEP
    weights = masked(ids, MaskedLM(0.5)).row_weight_N.reshape(4, 10).sum(1)
    assert weights.tolist() == [0, 2 - (ids[1, 1:3] == SEP).sum(), *(min(10, (row >= 5).sum()) for row in ids[2:])]


def test_padding_is_never_chosen_and_lowers_the_share():
    ids, lengths = rows(50, 40, special=0), np.array([1, 3, 11, 23, 40] * 10)
    ids[np.arange(40) >= lengths[:, None]] = 7  # an ordinary token: only the length may tell
    batch = masked(ids, MaskedLM(0.2), lengths=lengths)
    places, filled = batch.rows_N.numpy(), batch.row_weight_N.numpy() == 1
    assert (places[filled] % 40 < lengths[places[filled] // 40]).all()
    # Of one position there is only [CLS]; of three a fifth is rounded up to one, and of 23 to five.
    assert filled.reshape(50, 8).sum(1).tolist() == [0, 1, 2, 5, 8] * 10


def test_eighty_ten_ten():
    ids = rows(3000, 128)
    batch = masked(ids, MaskedLM(0.15))
    shown = batch.inputs["input_ids"].reshape(-1)[batch.rows_N].numpy()
    labels = batch.labels_N.numpy()
    total = labels.size
    assert abs((shown == MASK).mean() - 0.8) < 4 * np.sqrt(0.8 * 0.2 / total)
    # One in 55 of the random tokens is the label itself.
    assert abs((shown == labels).mean() - (0.1 + 0.1 / 55)) < 4 * np.sqrt(0.1 * 0.9 / total)
    others = shown[(shown != MASK) & (shown != labels)]
    counts = np.bincount(others, minlength=SIZE)
    assert (counts[:5] == 0).all()
    expected = others.size / 55
    assert ((counts[5:] - expected) ** 2 / expected).sum() < 54 + 6 * np.sqrt(2 * 54)


def test_every_position_is_as_likely():
    batch = masked(rows(20_000, 16, special=0), MaskedLM(0.2))
    counts = np.bincount(batch.rows_N.numpy() % 16, minlength=16)
    assert counts[0] == 0
    expected = 20_000 * 3 / 15
    assert ((counts[1:] - expected) ** 2 / expected).sum() < 14 + 6 * np.sqrt(2 * 14)


def test_pairs_of_positions_are_chosen_independently():
    batch = masked(rows(20_000, 12, special=0), MaskedLM(0.17))
    pairs = np.sort(batch.rows_N.numpy().reshape(-1, 2) % 12, axis=1)
    counts = np.bincount(pairs[:, 0] * 12 + pairs[:, 1])
    counts = counts[counts > 0]
    assert counts.size == 55
    expected = 20_000 / 55
    assert ((counts - expected) ** 2 / expected).sum() < 54 + 6 * np.sqrt(2 * 54)


def test_a_sequence_does_not_depend_on_its_company():
    ids, keys, lengths = rows(10, 50), keyed(3, np.arange(10)), np.full(10, 50)
    together = MaskedLM(0.3).batch(ids, lengths, keys, VOCABULARY)
    alone = MaskedLM(0.3).batch(ids[4:5], lengths[4:5], keys[4:5], VOCABULARY)
    assert (together.inputs["input_ids"][4] == alone.inputs["input_ids"][0]).all()
    assert (together.labels_N.reshape(10, -1)[4] == alone.labels_N).all()
    assert (together.rows_N.reshape(10, -1)[4] - 200 == alone.rows_N).all()


def words_of(row):
    """Lists of positions, by a plain loop."""
    words = []
    for place, token in enumerate(row):
        if words and CONTINUES_V[token] and not SPECIAL_V[row[place - 1]]:
            words[-1].append(place)
        else:
            words.append([place])
    return [word for word in words if not SPECIAL_V[row[word[0]]]]


def test_whole_words_are_taken_whole():
    ids = rows(200, 60)
    batch = masked(ids, MaskedLM(0.3, whole_word=True))
    rows_each = batch.rows_N.numpy().reshape(200, -1) % 60
    filled = batch.row_weight_N.numpy().reshape(200, -1) == 1
    longest = 0
    for row, places, full in zip(ids, rows_each, filled, strict=True):
        chosen, words = set(places[full]), words_of(row)
        longest = max(longest, *map(len, words))
        assert all(chosen.issuperset(word) or chosen.isdisjoint(word) for word in words)
        assert 18 - max(map(len, words)) < len(chosen) <= 18
    assert longest > 3
    assert filled.mean() > 0.9


def test_no_mask_token_and_bad_rates():
    plain = Vocabulary(SIZE, None, SEP, None, None, SPECIAL_V, CONTINUES_V, np.arange(5, SIZE))
    with pytest.raises(UserError, match="no mask token"):
        MaskedLM().batch(rows(1, 8), np.array([8]), keyed(0, np.arange(1)), plain)
    for rate in (0, 1, -0.1):
        with pytest.raises(UserError, match=r"objective\.mask_rate"):
            MaskedLM(rate)
    with pytest.raises(UserError, match=r"data\.length: 1;"):
        MaskedLM().slots(1)
