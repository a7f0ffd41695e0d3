"""Sentences with other words, chosen by a masked LM: the data augmentation of TinyBERT (Jiao et al. 2020, algorithm 1),
but for words of several tokens, which it replaces by neighbours in GloVe's space and which stay as they are here.

Shape suffixes: B rows, T position, N predicted rows, V vocabulary, K candidates.
"""

from collections.abc import Sequence

import numpy as np
import torch

from codistill.data.tokenizers import encoder_of
from codistill.evaluate.subjects import Subject

REPLACED, CANDIDATES = 0.4, 15  # the share of the words, and how many there are to choose from, as there
_ROWS_AT_ONCE = 64

# Of a sentence: where each word that can be replaced begins and ends, and what by.
Replaceable = list[tuple[int, int, list[str]]]


def augmented(sentences: Sequence[str], subject: Subject, *, copies: int, seed: int) -> list[list[str]]:
    """`copies` of each sentence; in each every word of one token is, with probability `REPLACED`, one of those that
    the model finds likeliest where it is masked."""
    draw = np.random.default_rng([seed, 1])
    found = replaceable(sentences, subject)
    return [
        [_copy(text, words, draw) for _ in range(copies)] for text, words in zip(sentences, found, strict=True)
    ]  # fmt: skip


def replaceable(sentences: Sequence[str], subject: Subject) -> list[Replaceable]:
    """The words of one token of each sentence, and their `CANDIDATES` likeliest replacements, the likeliest first."""
    encodings = encoder_of(subject.tokenizer).encode_batch(list(sentences))
    rows = [(number, place) for number, one in enumerate(encodings) for place in _words(one, sentences[number])]
    rows.sort(key=lambda row: len(encodings[row[0]].ids))  # so that little is padded
    names_V = np.array(_whole_words(subject), dtype=object)
    found: list[Replaceable] = [[] for _ in sentences]
    for at in range(0, len(rows), _ROWS_AT_ONCE):
        some = rows[at : at + _ROWS_AT_ONCE]
        likeliest_NK = _likeliest(subject, [(encodings[number].ids, place) for number, place in some], names_V)
        for (number, place), ids_K in zip(some, likeliest_NK, strict=True):
            found[number].append((*encodings[number].offsets[place], list(names_V[ids_K])))
    return [sorted(words) for words in found]


def _words(encoding, text: str) -> list[int]:
    """Where tokens stand that are a word by themselves, of letters only."""
    of = encoding.word_ids
    return [
        place
        for place, (begin, end) in enumerate(encoding.offsets)
        if of[place] is not None and of.count(of[place]) == 1 and text[begin:end].isalpha()
    ]


def _whole_words(subject: Subject) -> list[str]:
    """Of each id the word that it is, or "" where it is none, as parts of words and special tokens are."""
    names = [""] * subject.model.config.vocab_size
    for token, number in subject.tokenizer.get_vocab().items():
        names[number] = token if token.isalpha() else ""
    return names


@torch.no_grad()
def _likeliest(subject: Subject, rows: Sequence[tuple[list[int], int]], names_V: np.ndarray) -> np.ndarray:
    """(N, K) ids of words for each row, its token at that place masked."""
    longest = max(len(ids) for ids, _ in rows)
    ids_BT = torch.full((len(rows), longest), subject.tokenizer.pad_token_id)
    there_BT = torch.zeros_like(ids_BT)
    for row, (ids, place) in enumerate(rows):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        ids_BT[row, place] = subject.tokenizer.mask_token_id
        there_BT[row, : len(ids)] = 1
    place_N = torch.tensor([place for _, place in rows])
    logits_BTV = subject.model(input_ids=ids_BT, attention_mask=there_BT).logits
    logits_NV = logits_BTV[torch.arange(len(rows)), place_N].masked_fill(torch.from_numpy(names_V == ""), -torch.inf)
    return logits_NV.topk(CANDIDATES).indices.numpy()


def _copy(text: str, words: Replaceable, draw: np.random.Generator) -> str:
    for begin, end, candidates in reversed(words):  # from the end, so that the places before stay right
        if draw.random() < REPLACED:
            text = text[:begin] + candidates[draw.integers(len(candidates))] + text[end:]
    return text
