"""Batches: the same samples and masks for any ranks, micro-batches and resumption; every row once an epoch."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codistill.data import encode, shards
from codistill.data.batches import Batches, held_out
from codistill.data.packing import document_mask, document_positions
from codistill.data.prefetch import prefetched
from codistill.data.prepare import prepare
from codistill.data.tokenizers import Vocabulary
from codistill.errors import UserError
from codistill.objectives import MaskedLM
from data_examples import VOCABULARY, documents, vocabulary_file

PAD, CLS, SEP, MASK = (VOCABULARY.index(token) for token in ("[PAD]", "[CLS]", "[SEP]", "[MASK]"))
LENGTH = 16
KNOWN = Vocabulary(len(VOCABULARY), CLS, SEP, PAD, MASK, np.zeros(0), np.zeros(0), np.zeros(0))


def corpus_of(folder, texts, vocabulary, **options):
    for i, text in enumerate(texts):
        (folder / f"{i:05d}.txt").write_text(text)
    return prepare([str(folder)], vocabulary, folder / "out", processes=1, **options)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return str(vocabulary_file(tmp_path_factory.mktemp("vocabulary")))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, vocabulary):
    """A few shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_TOKENS", 1000)
        patch.setattr(encode, "BLOCK_CHARACTERS", 300)
        made = corpus_of(tmp_path_factory.mktemp("corpus"), documents(40), vocabulary)
    assert len(made.shards) > 3
    return made


@pytest.fixture(scope="module")
def other(tmp_path_factory, vocabulary):
    return corpus_of(tmp_path_factory.mktemp("other"), documents(20, seed=5), vocabulary, unit="sentence")


def batches(corpus, sequences=24, **options):
    return Batches(corpus, MaskedLM(0.3), length=LENGTH, sequences=sequences, **{"seed": 1, **options})


def content(micro_batches):
    """Everything in some micro-batches, as a multiset of sequences: what is shown, what is asked, what it weighs."""
    found = []
    for batch in micro_batches:
        asked = [array.reshape(len(batch.sample_ids), -1).tolist() for array in (batch.labels_N, batch.row_weight_N)]
        places = (batch.rows_N.reshape(len(batch.sample_ids), -1) % LENGTH).tolist()
        shown = batch.inputs["input_ids"].tolist()
        found += [str(sequence) for sequence in zip(batch.sample_ids, shown, places, *asked, strict=True)]
    return Counter(found)


@settings(max_examples=25, deadline=None)
@given(step=st.integers(0, 10_000), seed=st.integers(0, 5))
def test_ranks_and_micro_batches_change_nothing(corpus, step, seed):
    whole = content(batches(corpus, seed=seed).at(step))
    assert whole.total() == 24
    for world in (1, 2, 4):
        for accumulate in (1, 2, 3):
            parts = batches(corpus, seed=seed, accumulate=accumulate)
            ranks = [parts.at(step, rank=rank, world=world) for rank in range(world)]
            assert all(len(rank) == accumulate for rank in ranks)
            assert content(batch for rank in ranks for batch in rank) == whole


@settings(max_examples=40, deadline=None)
@given(sequences=st.integers(1, 60), seed=st.integers(0, 1000), tokens=st.none() | st.integers(1000, 4000))
def test_every_row_is_visited_once_an_epoch(corpus, sequences, seed, tokens):
    source = batches(corpus, sequences=sequences, seed=seed, tokens=tokens)
    steps = -(-3 * source.num_rows // sequences)
    samples = np.concatenate([source.locate(np.arange(s * sequences, (s + 1) * sequences))[2] for s in range(steps)])
    epochs = samples[: 3 * source.num_rows].reshape(3, -1)
    assert (np.sort(epochs, axis=1) == np.sort(epochs[0])).all()
    assert len(set(epochs[0])) == source.num_rows
    assert (epochs[0] != epochs[1]).any()


def test_an_epochs_end_inside_a_batch_and_new_masks_in_the_next(corpus):
    source = batches(corpus, sequences=24)
    assert source.num_rows % 24
    first = {i: b for s in range(source.num_rows // 24 + 1) for b in source.at(s) for i in b.sample_ids}
    assert set(first) == set(range(source.num_rows))
    last = source.at(source.num_rows // 24)[0]
    assert len(last.sample_ids) == 24
    shown = {}
    for step in range(2 * source.num_rows // 24 + 1):
        for batch in source.at(step):
            for sample, row in zip(batch.sample_ids, batch.inputs["input_ids"].tolist(), strict=True):
                shown.setdefault(sample, []).append(str(row))
    repeated = [rows for rows in shown.values() if len(rows) > 1]
    assert len(repeated) > source.num_rows // 2
    assert all(rows[0] != rows[1] for rows in repeated)


@pytest.mark.parametrize(("words", "rows"), [(28, 1), (29, 2), (30, 2), (44, 3)])
def test_a_row_is_as_many_tokens_as_fit_and_the_last_counts_too(tmp_path, vocabulary, words, rows):
    """A row has a start token and 15 of the text, in which a separator follows the words."""
    made = corpus_of(tmp_path, ["cat " * words], vocabulary)
    (shown,) = held_out(made, MaskedLM(0.3), length=LENGTH, sequences=9)
    assert shown.inputs["input_ids"].shape == (rows, LENGTH)
    assert batches(made, sequences=1).num_rows == rows


def test_a_new_process_goes_on_the_same(corpus):
    before = batches(corpus)
    for step in range(7):
        before.at(step)
    assert content(before.at(7)) == content(batches(corpus).at(7))
    assert content(batches(corpus, seed=2).at(7)) != content(before.at(7))


def masked_places(micro_batches) -> list[tuple[int, tuple[int, ...]]]:
    """Each sequence's sample, and which positions of it are asked."""
    places = []
    for batch in micro_batches:
        rows_BK = (batch.rows_N % LENGTH).reshape(len(batch.sample_ids), -1).sort().values
        places += zip(batch.sample_ids, map(tuple, rows_BK.tolist()), strict=True)
    return places


def agreement(one: dict, other: dict) -> float:
    """What part of the entries that both have is the same."""
    both = one.keys() & other.keys()
    return sum(one[key] == other[key] for key in both) / len(both)


def test_the_order_and_the_masks_each_depend_on_the_seed_and_on_the_epoch(corpus):
    rows = batches(corpus).num_rows
    one, other = (batches(corpus, sequences=rows, seed=seed) for seed in (1, 2))  # an epoch a step
    epochs = [(one, 0), (one, 1), (other, 0)]
    order, *orders = (dict(enumerate(s.locate(np.arange(rows) + rows * step)[2])) for s, step in epochs)
    masks, *others = (dict(masked_places(source.at(step))) for source, step in epochs)
    # Of 15 positions 5 are asked: two choices agree once in 3003.
    assert len(set(masks.values())) > 0.9 * rows
    assert all(agreement(order, found) < 0.1 for found in orders)
    assert all(agreement(masks, found) < 0.1 for found in others)


def test_packed_rows_are_the_running_text(corpus):
    source = batches(corpus)
    plain = source.parts[0].rows(np.arange(source.num_rows))
    expected = []
    for tokens in corpus.shards:
        usable = len(tokens) // (LENGTH - 1) * (LENGTH - 1)
        expected += [[CLS, *tokens[i : i + LENGTH - 1].tolist()] for i in range(0, usable, LENGTH - 1)]
    assert plain.ids_RT.tolist() == expected
    assert (plain.lengths_R == LENGTH).all()
    backwards = np.arange(source.num_rows)[::-1]
    assert source.parts[0].rows(backwards).ids_RT.tolist() == expected[::-1]


def test_masks_restore_to_the_text(corpus):
    source = batches(corpus)
    batch = source.at(3)[0]
    ids = batch.inputs["input_ids"].reshape(-1).clone()
    ids[batch.rows_N] = batch.labels_N
    restored = source.parts[0].rows(np.array(batch.sample_ids)).ids_RT
    assert (ids.reshape(restored.shape).numpy() == restored).all()


def test_padded_rows_are_one_unit_each(other):
    source = Batches(other, MaskedLM(0.3), length=LENGTH, sequences=8, packing="padded")
    assert source.num_rows == other.num_units
    ends = other.unit_ends[0].tolist()
    units = [other.tokens[a : b - 1].tolist() for a, b in zip([0, *ends], ends, strict=False)]
    rows = source.parts[0].rows(np.arange(source.num_rows))
    for ids, length, unit in zip(rows.ids_RT.tolist(), rows.lengths_R, units, strict=True):
        row = [CLS, *unit[: LENGTH - 2], SEP]
        assert length == len(row)
        assert ids == row + [PAD] * (LENGTH - len(row))
    batch = source.at(0)[0]
    assert (batch.inputs["attention_mask"] == (batch.inputs["input_ids"] != PAD)).all()
    assert not (batch.labels_N[batch.row_weight_N == 1] == PAD).any()


def test_units_and_documents_end_where_they_end_in_a_shard_of_many_blocks(tmp_path, vocabulary, monkeypatch):
    monkeypatch.setattr(encode, "BLOCK_CHARACTERS", 300)
    texts = [text for text in documents(12) if text.strip()]
    made = corpus_of(tmp_path, texts, vocabulary, unit="sentence")
    assert sum(map(len, texts)) > 10 * 300
    ((tokens,), (units,)) = made.shards, made.unit_ends
    assert units.tolist() == (np.flatnonzero(tokens == SEP) + 1).tolist()
    (ends,) = made.document_ends
    assert len(ends) == len(texts)
    tokenizer = made.tokenizer()
    for text, part in zip(texts, np.split(tokens, ends[:-1]), strict=True):
        assert part[part != SEP].tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_attention_within_documents():
    ids = np.array([[CLS, 9, SEP, 8, 7, SEP, 6, 5]])
    number = [0, 0, 0, 1, 1, 1, 2, 2]
    expected = [[a == b for b in number] for a in number]
    positions = document_positions(ids, KNOWN)
    assert positions.tolist() == [[0, 1, 2, 0, 1, 2, 0, 1]]
    mask = document_mask(positions)
    assert mask.shape == (1, 1, 8, 8)
    assert mask[0, 0].tolist() == expected


def test_one_token_for_both_ends_of_a_text():
    """At the beginning of a row it begins the text that follows, elsewhere it ends the one before."""
    both = replace(KNOWN, start=SEP)
    assert document_positions(np.array([[SEP, 9, 8, SEP, 7, SEP, SEP, 6]]), both).tolist() == [[0, 1, 2, 3, 0, 1, 0, 0]]
    assert document_positions(np.array([[SEP, 9, SEP]]), replace(KNOWN, start=None)).tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_models_attend_within_documents_only(corpus, family):
    """A document's features do not depend on what else is in its row."""
    from transformers import BertConfig, BertModel, ModernBertConfig, ModernBertModel

    sizes = {"vocab_size": len(VOCABULARY), "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    if family == "bert":
        model = BertModel(BertConfig(num_hidden_layers=2, **sizes)).eval()
    else:
        ends = {"pad_token_id": PAD, "bos_token_id": CLS, "eos_token_id": SEP, "cls_token_id": CLS, "sep_token_id": SEP}
        model = ModernBertModel(ModernBertConfig(num_hidden_layers=4, **sizes, **ends)).eval()
    ids = np.array([[CLS, 9, 10, SEP, 8, 7, 6, SEP], [CLS, 30, 31, SEP, 8, 7, 6, SEP]])
    positions = document_positions(ids, KNOWN)
    inputs = {"position_ids": positions, "attention_mask": document_mask(positions)}
    inputs = {name: torch.from_numpy(array) for name, array in inputs.items()}
    with torch.no_grad():
        features = model(input_ids=torch.from_numpy(ids), **inputs).last_hidden_state
        alone = model(input_ids=torch.from_numpy(ids[:1, 4:])).last_hidden_state
    torch.testing.assert_close(features[0, 4:], features[1, 4:])
    torch.testing.assert_close(features[0, 4:], alone[0])
    assert (features[0, :4] - features[1, :4]).abs().max() > 1e-3


def test_a_predictor_keeps_the_window_of_local_layers():
    """A row that is one document is to a predictor what it is to the model without a mask, also beyond the window."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    from codistill.models import Predictor

    sizes = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    ends = {"pad_token_id": PAD, "bos_token_id": CLS, "eos_token_id": SEP, "cls_token_id": CLS, "sep_token_id": SEP}
    torch.manual_seed(0)
    config = ModernBertConfig(num_hidden_layers=4, local_attention=8, initializer_range=1.0, **sizes, **ends)
    model = ModernBertForMaskedLM(config).eval()
    length = 40
    ids = torch.randint(10, 50, (2, length))
    positions = torch.arange(length).expand(2, -1)
    mask = torch.ones(2, 1, length, length, dtype=torch.bool)
    predictor = Predictor(model, 50)
    with torch.no_grad():
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        logits = predictor.logits(predictor(given, torch.arange(2 * length)))
        torch.testing.assert_close(logits, model(input_ids=ids).logits.flatten(0, 1))
        without_window = model(**given).logits.flatten(0, 1)
    assert (logits - without_window).abs().max() > 1e-2


def test_mixtures_give_exact_shares_and_whole_epochs(corpus, other):
    source = batches([(corpus, 3.0), (other, 1.0)])
    part, epoch, row = source.locate(np.arange(40_000))
    assert np.bincount(part).tolist() == [30_000, 10_000]
    assert abs(np.bincount(part[:1000])[0] - 750) < 60
    for number, rows in enumerate(source.parts):
        mine, epochs = row[part == number], epoch[part == number]
        for at in range(len(mine) // rows.num_rows):  # as they come: each row once, before any comes again
            passed = slice(at * rows.num_rows, (at + 1) * rows.num_rows)
            assert sorted(mine[passed]) == list(range(rows.num_rows))
            assert set(epochs[passed]) == {at}
    whole = content(source.at(5))
    halves = [source.at(5, rank=rank, world=2)[0] for rank in range(2)]
    assert content(halves) == whole


def test_each_corpus_of_a_mixture_has_masks_of_its_own(corpus):
    """The same corpus twice, in samples of the same row and epoch."""
    source = batches([(corpus, 1.0), (corpus, 1.0)], sequences=900)
    found = {0: {}, 1: {}}
    for part, epoch, row, (_, places) in zip(*source.locate(np.arange(900)), masked_places(source.at(0)), strict=True):
        found[part][epoch, row] = places
    assert len(found[0].keys() & found[1].keys()) > 20
    assert agreement(*found.values()) < 0.1


def test_which_corpus_comes_when_depends_on_the_seed_and_on_the_stretch(corpus):
    one, other = (
        batches([(corpus, 1.0), (corpus, 1.0)], seed=seed).locate(np.arange(20_000))[0].reshape(2, -1)
        for seed in (1, 2)
    )
    assert one.sum(1).tolist() == [5000, 5000]
    for a, b in ((one[0], one[1]), (one[0], other[0])):
        assert (a == b).mean() == pytest.approx(0.5, abs=0.05)  # as two coins agree


def test_each_corpus_of_a_mixture_has_an_order_of_its_own(corpus):
    """The same text twice: its rows come in two orders, or both halves would tell the model the same at each step."""
    source = batches([(corpus, 1.0), (corpus, 1.0)])
    part_B, epoch_B, row_B = source.locate(np.arange(2 * source.parts[0].num_rows))
    first, second = (row_B[(part_B == part) & (epoch_B == 0)] for part in (0, 1))
    many = min(len(first), len(second))
    assert many > 50
    assert (first[:many] == second[:many]).mean() < 0.2


def test_mixtures_of_different_tokenizers_are_refused(corpus, tmp_path):
    foreign = corpus_of(tmp_path, documents(3), "train:wordpiece:100")
    with pytest.raises(UserError, match="prepared with the tokenizer train:wordpiece:100, but"):
        batches([(corpus, 1), (foreign, 1)])
    with pytest.raises(UserError, match="every weight must be above 0"):
        batches([(corpus, 1), (corpus, 0)])


def test_a_token_budget_takes_rows_from_all_of_the_text(corpus):
    source = batches(corpus, tokens=50 * LENGTH)
    assert source.num_rows == 50
    _, _, row = source.locate(np.arange(50))
    total = batches(corpus).num_rows
    assert sorted(row) == [i * total // 50 for i in range(50)]


def test_held_out_batches_are_fixed_and_in_order(corpus):
    options = {"length": LENGTH, "sequences": 32, "seed": 3}
    every = held_out(corpus, MaskedLM(0.3), **options)
    assert [i for batch in every for i in batch.sample_ids] == list(range(batches(corpus).num_rows))
    again = held_out(corpus, MaskedLM(0.3), **options)
    assert all(content([a]) == content([b]) for a, b in zip(every, again, strict=True))
    some = held_out(corpus, MaskedLM(0.3), limit=40, **options)
    assert [len(batch.sample_ids) for batch in some] == [32, 8]
    assert content(some) <= content(every)


def test_a_limit_takes_held_out_rows_evenly_from_all_of_the_text(corpus):
    total = batches(corpus).num_rows
    some = held_out(corpus, MaskedLM(0.3), length=LENGTH, sequences=32, limit=40)
    rows = [i for batch in some for i in batch.sample_ids]
    steps = np.diff([*rows, total])
    assert rows[0] == 0
    assert set(steps) <= {total // 40, total // 40 + 1}


def test_held_out_masks_depend_on_the_seed_and_are_not_those_of_training(corpus):
    options = {"length": LENGTH, "sequences": 32}
    one, other = (dict(masked_places(held_out(corpus, MaskedLM(0.3), seed=seed, **options))) for seed in (1, 2))
    trained = dict(masked_places(batches(corpus, sequences=len(one), seed=1).at(0)))
    assert len(set(one.values())) > 0.9 * len(one)
    assert agreement(one, other) < 0.1
    assert agreement(one, trained) < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequences": 10_000}, "the text is too short"),
        ({"packing": "tight"}, "there are contiguous, padded"),
        ({"tokens": 100}, "the text is too short, 6 rows"),
    ],
)
def test_bad_settings(corpus, options, message):
    with pytest.raises(UserError, match=message):
        batches(corpus, **options)


def test_uneven_shares_are_refused(corpus):
    with pytest.raises(UserError, match="evenly to 1 micro-batches on 5 ranks; choose a multiple of 5"):
        batches(corpus).at(0, world=5)


def test_no_row_to_validate_on(tmp_path, vocabulary):
    short = corpus_of(tmp_path, ["the cat"], vocabulary)
    with pytest.raises(UserError, match=r"data\.validation: the text is too short, 3 tokens"):
        held_out(short, MaskedLM(), length=LENGTH, sequences=4)


def test_prefetching_changes_nothing(corpus):
    source = batches(corpus, accumulate=2)
    ahead = list(prefetched(source, 5, 12, rank=1, world=2))
    plain = [source.at(step, rank=1, world=2) for step in range(5, 12)]
    assert [content(step) for step in ahead] == [content(step) for step in plain]


def test_prefetching_passes_errors_on_and_stops_when_left(corpus):
    import threading

    with pytest.raises(UserError, match="cannot be shared out"):
        list(prefetched(batches(corpus), 0, 3, world=5))
    running = threading.active_count()
    stream = prefetched(batches(corpus), 0, 1000)
    next(stream)
    assert threading.active_count() == running + 1
    stream.close()
    assert threading.active_count() == running
