"""Tokenizers: load one, train one, and what the masking has to know of it.

Shape suffix: V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from codistill.errors import UserError, first_line
from codistill.folders import is_local

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_ROLES = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
_MOST_LETTERS = 1000
_BLOCK_CHARACTERS = 1 << 18


def load_tokenizer(spec: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a Hugging Face folder or hub name, of a folder with vocab.json and merges.txt, or of a
    WordPiece vocabulary file alone (one token a line; BERT's rules, lower-casing unless it holds capital letters).

    Raises UserError when there is none.
    """
    path = Path(spec)
    if path.is_file():
        return _wrap(_wordpiece(_read_vocabulary(path)), path.stem)
    if (path / "merges.txt").is_file() and not (path / "tokenizer.json").is_file():
        return _byte_level_of(path)
    return _pretrained(str(spec))


def train_tokenizer(kind: str, size: int, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `size` entries trained on `texts`: `kind` is "wordpiece" (BERT's uncased rules) or "bpe"
    (byte level). Equal texts give equal tokenizers, in every process. UserError for an unknown kind or a small size.
    """
    trainers = {"wordpiece": _train_wordpiece, "bpe": _train_bpe}
    if kind not in trainers:
        raise UserError(f"tokenizer train:{kind}: unknown kind; known are {', '.join(trainers)}")
    smallest = {"wordpiece": 64, "bpe": 256 + len(SPECIAL)}[kind]
    if size < smallest:
        raise UserError(f"tokenizer train:{kind}:{size}: a vocabulary of at least {smallest} is needed")
    return _wrap(trainers[kind](size, texts), f"{kind}-{size}")


def parse_training_spec(spec: str) -> tuple[str, int]:
    """("wordpiece", 30522) of "train:wordpiece:30522"; UserError for anything else."""
    parts = spec.split(":")
    if len(parts) != 3 or not parts[2].isdecimal():
        raise UserError(f"tokenizer {spec}: wanted train:KIND:SIZE, such as train:wordpiece:30522 or train:bpe:32000")
    return parts[1], int(parts[2])


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """The largest id of the full token map + 1 (added tokens included, holes counted)."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 (hex) of the token → id map: chat templates, padding and file layout do not count."""
    ordered = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(ordered).encode()).hexdigest()


def special_tokens_of(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What begins, ends, fills and hides text, and what is never masked: ids, None for a role that there is not."""
    found = Vocabulary.of(tokenizer)
    roles = {name: getattr(found, name) for name in ("start", "separator", "pad", "mask")}
    return {**roles, "special": np.flatnonzero(found.special_V).tolist()}


def encoder_of(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy of the Rust tokenizer that only encodes: no padding, no truncation, and a special token that is spelled
    out in the text, such as a literal [MASK], is text."""
    from tokenizers import Tokenizer

    return encoder_from(Tokenizer.to_str(tokenizer.backend_tokenizer))


def encoder_from(serialised: str) -> Tokenizer:
    """What `encoder_of` gives, from the text of a tokenizer.json."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_str(serialised)
    encoder.no_padding()
    encoder.no_truncation()
    encoder.encode_special_tokens = True
    return encoder


@dataclass(frozen=True)
class Vocabulary:
    """What masking and packing know of a tokenizer. `special_V`: never masked. `continues_V`: does not begin a word.
    `ordinary`: the ids that may replace a token at random, int64. `start` may be None (no [CLS] and no BOS)."""

    size: int
    start: int | None
    separator: int
    pad: int | None
    mask: int | None
    special_V: np.ndarray
    continues_V: np.ndarray
    ordinary: np.ndarray

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
        """Raises UserError when the tokenizer has neither a separator nor an end-of-text token."""
        ids, size = tokenizer.get_vocab(), vocabulary_size(tokenizer)
        special_V = np.zeros(size, dtype=bool)
        special_V[tokenizer.all_special_ids] = True
        known = np.zeros(size, dtype=bool)
        known[list(ids.values())] = True
        return cls(
            size=size,
            start=_start_of(tokenizer),
            separator=separator_of(tokenizer),
            pad=tokenizer.pad_token_id,
            mask=tokenizer.mask_token_id,
            special_V=special_V,
            continues_V=_continuations(ids, size),
            ordinary=np.flatnonzero(known & ~special_V),
        )


def separator_of(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id that ends a unit of text: [SEP], else the end-of-text token; UserError when there is neither."""
    found = _first(tokenizer.sep_token_id, tokenizer.eos_token_id)
    if found is None:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path or '?'}: no [SEP] and no end-of-text token to part texts with; "
            "give one that has"
        )
    return found


def starts_and_ends(tokenizer: PreTrainedTokenizerFast) -> tuple[tuple[str, int] | None, tuple[str, int]]:
    """The token that begins a text, where there is one, and the one that ends it, each with its id."""
    first, last = _start_of(tokenizer), separator_of(tokenizer)
    start = None if first is None else (str(tokenizer.convert_ids_to_tokens(first)), first)
    return start, (str(tokenizer.convert_ids_to_tokens(last)), last)


def template(start: tuple[str, int] | None, end: tuple[str, int], *, is_closed: bool = True) -> TemplateProcessing:
    """What puts `start`, a token and its id, before a text, and `end` after each of two; after a single one too, if
    texts are `is_closed`."""
    from tokenizers.processors import TemplateProcessing

    opening = "" if start is None else f"{start[0]} "
    return TemplateProcessing(
        single=f"{opening}$A {end[0]}" if is_closed else f"{opening}$A",
        pair=f"{opening}$A {end[0]} $B:1 {end[0]}:1",
        special_tokens=list(dict.fromkeys([end] if start is None else [start, end])),
    )


def own_padding(tokenizer: PreTrainedTokenizerFast | None) -> int | None:
    """The id of the token that pads and does nothing else: None where it begins or ends texts too, or stands for what
    is unknown or masked, and where there is none."""
    others = [getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "cls", "sep", "unk", "mask")]
    pad = getattr(tokenizer, "pad_token_id", None)
    return None if pad in others else pad


def _start_of(tokenizer: PreTrainedTokenizerFast) -> int | None:
    return _first(tokenizer.cls_token_id, tokenizer.bos_token_id)


def _first(*ids: int | None) -> int | None:
    return next((i for i in ids if i is not None), None)


def _continuations(ids: dict[str, int], size: int) -> np.ndarray:
    """Which tokens go on with a word: "##…" in WordPiece; where words are marked at their start (Ġ, ▁), all others."""
    marked = {token[0] for token in ids if token[:1] in "Ġ▁"}
    pieces = any(token.startswith("##") and len(token) > 2 for token in ids)
    continues_V = np.zeros(size, dtype=bool)
    if pieces:
        continues_V[[i for token, i in ids.items() if token.startswith("##")]] = True
    elif marked:
        continues_V[[i for token, i in ids.items() if token[:1] not in marked and token[:1] != "Ċ"]] = True
    return continues_V


def _pretrained(spec: str) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    is_here, wanted = Path(spec).exists(), "give a tokenizer folder, a vocabulary file or a hub name"
    if not is_here and is_local(spec):
        raise UserError(f"tokenizer {spec}: there is no such folder here; {wanted}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(spec)
    except Exception as error:
        nowhere = (
            "no tokenizer can be read there" if is_here else "there is no such folder here, and the hub gives none"
        )
        raise UserError(f"tokenizer {spec}: {nowhere} ({first_line(error).rstrip('.: ')}); {wanted}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"tokenizer {spec}: it has no fast version; save it with a tokenizer.json")
    # transformers makes a tokenizer of special tokens alone from a model's configuration.
    if not set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids):
        raise UserError(f"tokenizer {spec}: it has no vocabulary; name the tokenizer that the model was trained with")
    return tokenizer


def _wrap(backend: Tokenizer, name: str) -> PreTrainedTokenizerFast:
    """A Hugging Face tokenizer with BERT's roles, as far as the vocabulary has them."""
    from transformers import PreTrainedTokenizerFast

    present = backend.get_vocab()
    roles = {role: token for role, token in _ROLES.items() if token in present}
    if "[CLS]" in present and "[SEP]" in present:
        backend.post_processor = template(*((token, present[token]) for token in ("[CLS]", "[SEP]")))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, name_or_path=name, clean_up_tokenization_spaces=False, **roles
    )


def _read_vocabulary(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tokenizer {path}: not a readable vocabulary file, one token a line ({error})") from error
    tokens = lines[:-1] if lines[-1] == "" else lines
    ids = {token.rstrip("\r"): i for i, token in enumerate(tokens)}
    missing = [token for token in ("[UNK]", "[SEP]") if token not in ids]
    if missing:
        wanted = "expected a WordPiece vocabulary, one token a line; give other tokenizers as a folder"
        raise UserError(f"tokenizer {path}: no {' and no '.join(missing)} among its {len(ids)} lines; {wanted}")
    return ids


def _wordpiece(ids: dict[str, int]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    cased = any(token != token.lower() and not token.startswith("[") for token in ids)
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=not cased)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens([token for token in SPECIAL if token in ids])
    return tokenizer


def _byte_level_of(folder: Path) -> PreTrainedTokenizerFast:
    from tokenizers import models
    from transformers import PreTrainedTokenizerFast

    try:
        backend = _byte_level(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    except Exception as error:
        raise UserError(f"tokenizer {folder}: vocab.json and merges.txt make no byte-level BPE ({error})") from error
    end = "<|endoftext|>"
    roles = {"eos_token": end, "bos_token": end} if end in backend.get_vocab() else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, name_or_path=folder.name, clean_up_tokenization_spaces=False, **roles
    )


def _byte_level(model) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _train_bpe(size: int, texts: Iterable[str]) -> Tokenizer:
    from tokenizers import models, pre_tokenizers, trainers

    tokenizer = _byte_level(models.BPE())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _train_wordpiece(size: int, texts: Iterable[str]) -> Tokenizer:
    """The Rust trainer numbers the "##x" letters in the order of a hash map, and ties between merges follow those
    numbers, so two runs differ. Here the letters are found first and given to the real run in sorted order."""
    kept = list(texts)
    letters = _letters(kept)
    inner = sorted(token for token in _learn(letters, SPECIAL, 1, kept) if token.startswith("##") and len(token) == 3)
    learned = _learn(letters, SPECIAL + inner, size, kept)
    return _wordpiece(learned)


def _learn(letters: list[str], first: list[str], size: int, texts: list[str]) -> dict[str, int]:
    from tokenizers import trainers

    scratch = _wordpiece({token: i for i, token in enumerate(SPECIAL)})
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        special_tokens=first,
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        show_progress=False,
    )
    scratch.train_from_iterator(texts, trainer)
    return scratch.get_vocab()


def _letters(texts: list[str]) -> list[str]:
    """The most frequent letters after normalisation, at most 1000, ties to the smaller code point; sorted."""
    normalize = _wordpiece({token: i for i, token in enumerate(SPECIAL)}).normalizer.normalize_str
    counts = np.zeros(0x110000, dtype=np.int64)
    for text in _joined(texts):
        points = np.frombuffer(normalize(text).encode("utf-32-le"), dtype=np.uint32)
        seen, times = np.unique(points, return_counts=True)
        counts[seen] += times
    order = np.argsort(-counts, kind="stable")[:_MOST_LETTERS]
    found = (chr(point) for point in order if counts[point])
    return sorted(letter for letter in found if not letter.isspace())


def _joined(texts: list[str]) -> Iterator[str]:
    """Few long texts instead of many short ones, for numpy's sake."""
    block: list[str] = []
    held = 0
    for text in texts:
        block.append(text)
        held += len(text)
        if held >= _BLOCK_CHARACTERS:
            yield "\n".join(block)
            block, held = [], 0
    yield "\n".join(block)
