"""Shards: how encoded blocks become files, one finished shard at a time, so that a killed preparation can go on.

A shard is three files: tokens-N.bin (uint16 or uint32), and units-N.bin and documents-N.bin (uint32: where each unit
and document ends, counted in tokens from the shard's start, exclusive).
"""

import hashlib
import json
import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from codistill.data.encode import Block
from codistill.data.sources import hash_file
from codistill.errors import MachineError, UserError
from codistill.files import write_file

SHARD_TOKENS = 1 << 25


@dataclass(frozen=True)
class Shard:
    """What the manifest says of one shard. `files`: name to [bytes, SHA-256]. `blocks`: how many blocks of the input
    are in this shard."""

    tokens: int
    units: int
    documents: int
    blocks: int
    files: dict[str, list]


def shard_files(number: int) -> tuple[str, str, str]:
    """The names of the files of a shard: tokens, units, documents."""
    return (f"tokens-{number:05d}.bin", f"units-{number:05d}.bin", f"documents-{number:05d}.bin")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failing write into one clear MachineError that names the file."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        remedy = "make room and run the same command again, it goes on from the last finished shard"
        raise MachineError(f"{path}: cannot be written ({reason}); {remedy}") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Puts a whole file in place, or nothing; MachineError as in `writing`."""
    with writing(path):
        write_file(path, content)


def finished_shards(folder: Path, records: Path) -> list[Shard]:
    """The shards that an earlier, killed preparation finished: those whose record is there and whose files agree."""
    shards: list[Shard] = []
    while (record := records / f"shard-{len(shards):05d}.json").is_file():
        shard = Shard(**json.loads(record.read_text(encoding="utf-8")))
        if not all(_agrees(folder / name, *entry) for name, entry in shard.files.items()):
            break
        shards.append(shard)
    return shards


def _agrees(path: Path, size: int, digest: str) -> bool:
    return path.is_file() and path.stat().st_size == size and hash_file(path) == digest


def write_shards(
    blocks: Iterable[Block], folder: Path, records: Path, dtype: np.dtype, vocabulary: int, first: int
) -> Generator[Block | Shard]:
    """Writes shards numbered from `first` on; gives back each block once it is taken, and each shard once it is safe
    on disk with its record."""
    source, number = iter(blocks), first
    for begin in source:
        with _OpenShard(folder, number, dtype) as shard:
            for block in chain([begin], source):
                _require_known(block, vocabulary)
                shard.add(block)
                yield block
                if shard.is_full(block):
                    break
            yield shard.finish(records)
        number += 1


def _require_known(block: Block, vocabulary: int) -> None:
    if block.tokens.size and int(block.tokens.max()) >= vocabulary:
        largest = int(block.tokens.max())
        raise UserError(f"tokenizer: gave the id {largest}, but its vocabulary has {vocabulary}; it is damaged")


class _OpenShard:
    """A shard being written: files, sums and counts. Closed without `finish`, it leaves files without a record."""

    def __init__(self, folder: Path, number: int, dtype: np.dtype):
        self.folder, self.number, self.dtype = folder, number, dtype
        self.names = shard_files(number)
        self.sums = [hashlib.sha256() for _ in self.names]
        self.counts = [0, 0, 0]
        self.blocks = 0
        with writing(folder / self.names[0]):
            self.files = [open(folder / name, "wb") for name in self.names]  # noqa: SIM115 (closed in `__exit__`)

    def __enter__(self) -> "_OpenShard":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files:
            # What a full disk leaves in the buffer cannot be written now either; the error is on its way already.
            with suppress(OSError):
                file.close()

    def add(self, block: Block) -> None:
        start = np.uint32(self.counts[0])
        arrays = (block.tokens.astype(self.dtype), block.unit_ends + start, block.document_ends + start)
        for i, array in enumerate(arrays):
            with writing(self.folder / self.names[i]):
                self.files[i].write(array.tobytes())
            self.sums[i].update(array.tobytes())
            self.counts[i] += array.size
        self.blocks += 1

    def is_full(self, block: Block) -> bool:
        """At a document's end where possible, so that documents of common length lie in one shard."""
        at_end = block.document_ends.size > 0 and block.document_ends[-1] == block.tokens.size
        return self.counts[0] >= SHARD_TOKENS * (1 if at_end else 4)

    def finish(self, records: Path) -> Shard:
        for name, file in zip(self.names, self.files, strict=True):
            with writing(self.folder / name):
                file.flush()
                os.fsync(file.fileno())
        sizes = [(self.folder / name).stat().st_size for name in self.names]
        files = {
            name: [size, digest.hexdigest()] for name, size, digest in zip(self.names, sizes, self.sums, strict=True)
        }
        tokens, units, documents = self.counts
        shard = Shard(tokens, units, documents, self.blocks, files)
        write_atomically(records / f"shard-{self.number:05d}.json", json.dumps(asdict(shard)).encode())
        return shard
