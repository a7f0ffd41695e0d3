"""Texts to ids and batches for fine-tuning and scoring: where they are cut, closed and padded, and on which threads."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from codistill.evaluate.encode import batch_of, encode, training_order
from codistill.evaluate.spread import spread

WORDS = ["a", "b", "c", "d", "[UNK]", "[PAD]", "[END]"]


@pytest.fixture
def bare() -> PreTrainedTokenizerFast:
    """Adds no special tokens by itself; pads with id 5."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="[END]", sep_token="[END]"
    )


def test_a_tokenizer_that_closes_nothing_gets_its_separator_after_each_text(bare):
    single = encode([["a b"]], bare, max_length=9, with_types=False)
    pair = encode([["a b"], ["c"]], bare, max_length=9, with_types=True)
    assert single.ids[0].tolist() == [0, 1, 6]
    assert pair.ids[0].tolist() == [0, 1, 6, 2, 6]
    assert pair.types[0].tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("texts", "ids"),
    [(["a b c d a b", "c d"], [0, 1, 2, 6, 2, 3, 6]), (["c d", "a b c d a b"], [2, 3, 6, 0, 1, 2, 6])],
)
def test_a_pair_is_cut_at_the_end_of_its_longer_text(texts, ids, bare):
    cut = encode([[text] for text in texts], bare, max_length=7, with_types=False)
    assert cut.ids[0].tolist() == ids
    assert cut.num_truncated == 1


def test_a_batch_is_padded_with_what_the_tokenizer_pads_with(bare):
    encoded = encode([["a b", "a"], ["c d", "b"]], bare, max_length=9, with_types=True)
    batch = batch_of(encoded, np.array([0, 1]), np.array([1.5, 0.5]))
    assert batch.inputs["input_ids"].tolist() == [[0, 1, 6, 2, 3, 6], [0, 6, 1, 6, 5, 5]]
    assert batch.inputs["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0]]
    assert batch.inputs["attention_mask"].tolist() == [[1] * 6, [1] * 4 + [0] * 2]
    assert batch.labels_N.tolist() == [1.5, 0.5]


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 513])
def test_no_batch_of_an_epoch_is_larger_than_was_asked_and_only_a_pools_last_is_smaller(rows):
    sizes = [len(batch) for batch in training_order(np.arange(1, rows + 1), 8, 0, 0)]
    pools = [min(512, rows - at) for at in range(0, rows, 512)]
    assert sorted(sizes) == sorted(size for pool in pools for size in [8] * (pool // 8) + [pool % 8] * (pool % 8 > 0))


@pytest.mark.parametrize("threads", [1, 3])
def test_work_that_is_spread_runs_on_a_single_thread_each_without_gradients(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        seen = list(
            spread(lambda i: (i, torch.get_num_threads(), torch.is_grad_enabled()), range(5), torch.device("cpu"))
        )
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert seen == [(i, 1, False) for i in range(5)]
