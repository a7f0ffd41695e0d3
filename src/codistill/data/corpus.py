"""A corpus: a folder of memory-mapped tokens, verified against its manifest.

Shape suffix: V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from codistill.data.shards import shard_files, write_atomically
from codistill.data.sources import hash_file
from codistill.errors import MachineError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = "codistill-corpus-1"
_CHUNK = 1 << 22


class Corpus:
    """Prepared text. `shards`: per shard a memory-mapped vector of token ids; `unit_ends` and `document_ends`: per
    shard where they end (exclusive, from the shard's start); `manifest`: what was read and how.
    """

    def __init__(self, folder: Path, manifest: dict):
        self.folder, self.manifest = folder, manifest
        self._tokenizer: PreTrainedTokenizerFast | None = None
        names = [shard_files(number) for number in range(len(manifest["shards"]))]
        dtypes = (np.dtype(manifest["dtype"]), np.dtype("uint32"), np.dtype("uint32"))
        mapped = [[_mapped(folder / name, dtype) for name, dtype in zip(row, dtypes, strict=True)] for row in names]
        self.shards, self.unit_ends, self.document_ends = ([row[i] for row in mapped] for i in range(3))

    @classmethod
    def open(cls, folder: str | Path) -> Corpus:
        """The corpus in `folder`. Sizes are checked every time; hashes and ids whenever a file is not known to be the
        one that was checked before (by size and time of change). UserError naming the file that disagrees.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if not _verified_before(folder, manifest):
            _verify(folder, manifest)
            remember_verified(folder, manifest)
        return cls(folder, manifest)

    @property
    def num_tokens(self) -> int:
        return self.manifest["tokens"]

    @property
    def num_units(self) -> int:
        return self.manifest["units"]

    @property
    def num_documents(self) -> int:
        return self.manifest["documents"]

    @property
    def tokenizer_hash(self) -> str:
        return self.manifest["tokenizer"]["hash"]

    @property
    def vocabulary_size(self) -> int:
        return self.manifest["tokenizer"]["vocabulary"]

    @property
    def tokens(self) -> np.ndarray:
        """All tokens as one vector: memory-mapped when there is one shard, else a copy in memory."""
        return self.shards[0] if len(self.shards) == 1 else np.concatenate(self.shards)

    def with_tokenizer(self, tokenizer: PreTrainedTokenizerFast, owner: str) -> Corpus:
        """This corpus, read with the tokenizer of `owner`: the tokens are the same for tokenizers that begin, pad or
        mask with others, but what is made of the tokens is not.

        UserError naming both for one with another token → id map, or that parts texts by another token.
        """
        from codistill.data.tokenizers import separator_of

        self.require(tokenizer, owner)
        made, wanted = self.manifest["tokenizer"]["separator"], separator_of(tokenizer)
        if made != wanted:
            one, other = (tokenizer.convert_ids_to_tokens(end) for end in (made, wanted))
            raise UserError(
                f"corpus {self.folder}: its texts end with {one!r}, but those of {owner} with {other!r}; prepare the "
                "text with that one"
            )
        self._tokenizer = tokenizer
        return self

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer the corpus was opened with, or else the one it was made with, from its own folder."""
        from codistill.data.tokenizers import load_tokenizer

        if self._tokenizer is not None:
            return self._tokenizer
        tokenizer = load_tokenizer(self.folder / "tokenizer")
        self.require(tokenizer, str(self.folder / "tokenizer"))
        return tokenizer

    def require(self, tokenizer: PreTrainedTokenizerFast, owner: str) -> None:
        """UserError naming both unless `tokenizer`, that of `owner`, has the corpus's token → id map."""
        from codistill.data.tokenizers import tokenizer_hash

        if tokenizer_hash(tokenizer) != self.tokenizer_hash:
            made = self.manifest["tokenizer"]["name"]
            raise UserError(
                f"corpus {self.folder}: prepared with the tokenizer {made}, but {owner} has another "
                f"({len(tokenizer.get_vocab())} entries against {self.vocabulary_size}); prepare the text with that one"
            )

    def unigram_counts(self) -> np.ndarray:
        """How often each id occurs, separators included: int64 (V,)."""
        return np.load(self.folder / "unigram.npy", allow_pickle=False)

    def held_out(self) -> Corpus:
        """The documents kept apart by `held_out=…` at preparation; UserError when there are none."""
        if not (self.folder / "held_out").is_dir():
            raise UserError(f"corpus {self.folder}: was prepared without a held-out part; prepare it with --held-out")
        return Corpus.open(self.folder / "held_out")


def read_manifest(folder: Path) -> dict:
    """The manifest of a corpus folder; UserError when there is none or it is damaged."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise UserError(f"{path}: format {manifest['format']!r}, expected {FORMAT!r}; prepare the text again")
    except OSError as error:
        what = f"no readable manifest.json ({error.strerror}), so it is no prepared text"
        raise UserError(f"corpus {folder}: {what}; make it with codistill prepare") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); prepare the text again") from error
    return manifest


def remember_verified(folder: Path, manifest: dict) -> None:
    """Notes that the files, as they now are, were checked; a folder that cannot be written is checked every time."""
    with suppress(MachineError):
        write_atomically(folder / ".verified", json.dumps(_stamps(folder, manifest)).encode())


def count_ids(shards: Sequence[np.ndarray], vocabulary: int) -> np.ndarray:
    """How often each id occurs: int64 (V,)."""
    counts_V = np.zeros(vocabulary, dtype=np.int64)
    for tokens in shards:
        for start in range(0, len(tokens), _CHUNK):
            counts_V += np.bincount(tokens[start : start + _CHUNK], minlength=vocabulary)
    return counts_V


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def _files(manifest: dict) -> dict[str, list]:
    shards = {name: entry for shard in manifest["shards"] for name, entry in shard["files"].items()}
    return shards | manifest["files"]


def _stamps(folder: Path, manifest: dict) -> dict[str, list[int]]:
    """Size and time of change of every file; checks the sizes on the way."""
    stamps = {}
    for name, (size, _) in _files(manifest).items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: missing, though the manifest names it; prepare the text again")
        state = path.stat()
        if state.st_size != size:
            raise UserError(f"{path}: {state.st_size} bytes, the manifest says {size}; prepare the text again")
        stamps[name] = [state.st_size, state.st_mtime_ns]
    return stamps


def _verified_before(folder: Path, manifest: dict) -> bool:
    stamps = _stamps(folder, manifest)
    try:
        return json.loads((folder / ".verified").read_text(encoding="utf-8")) == stamps
    except (OSError, ValueError):
        return False


def _verify(folder: Path, manifest: dict) -> None:
    for name, (_, digest) in _files(manifest).items():
        if hash_file(folder / name) != digest:
            what = "its SHA-256 is not the manifest's, so it is damaged"
            raise UserError(f"{folder / name}: {what}; prepare the text again")
    vocabulary = manifest["tokenizer"]["vocabulary"]
    for number, shard in enumerate(Corpus(folder, manifest).shards):
        for start in range(0, len(shard), _CHUNK):
            largest = int(shard[start : start + _CHUNK].max())
            if largest >= vocabulary:
                path = folder / shard_files(number)[0]
                raise UserError(
                    f"{path}: holds the id {largest}, but the vocabulary has {vocabulary} entries; prepare it again"
                )
