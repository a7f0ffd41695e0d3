"""Blocks of fragments to blocks of tokens, here or in worker processes, always in the same order.

A block is a function of the text and the settings alone, so the number of processes changes nothing.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from codistill.data.units import Fragment
from codistill.errors import MachineError

BLOCK_CHARACTERS = 1 << 19
_AGAIN = "run the same command again: it goes on from the last finished shard"


@dataclass(frozen=True)
class Block:
    """Encoded fragments: `tokens` (uint32, separators included), and where units and documents end in them."""

    tokens: np.ndarray
    unit_ends: np.ndarray
    document_ends: np.ndarray


def blocks_of(fragments: Iterable[Fragment]) -> Iterator[list[Fragment]]:
    """Consecutive fragments, about half a million characters at a time."""
    block: list[Fragment] = []
    held = 0
    for fragment in fragments:
        block.append(fragment)
        held += len(fragment.text)
        if held >= BLOCK_CHARACTERS:
            yield block
            block, held = [], 0
    if block:
        yield block


def encode_block(encoder, separator: int, block: list[Fragment]) -> Block:
    """One block; the separator follows every fragment that ends a unit."""
    encodings = encoder.encode_batch_fast([fragment.text for fragment in block], add_special_tokens=False)
    parts = [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
    ends_unit = np.array([fragment.ends_unit for fragment in block])
    ends_document = np.array([fragment.ends_document for fragment in block])
    sizes = np.array([part.size for part in parts]) + ends_unit
    ends = np.cumsum(sizes)
    tokens = np.full(ends[-1], separator, dtype=np.uint32)
    for part, end, size in zip(parts, ends, sizes, strict=True):
        tokens[end - size : end - size + part.size] = part
    return Block(tokens, ends[ends_unit].astype(np.uint32), ends[ends_document].astype(np.uint32))


def encode_all(blocks: Iterable[list[Fragment]], serialised: str, separator: int, processes: int) -> Generator[Block]:
    """The encoded blocks in order, at most two per process in flight. `serialised`: the text of a tokenizer.json."""
    if processes <= 1:
        encode = _encoder(serialised, separator)
        for block in blocks:
            yield encode(block)
        return
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(processes))
        idle: SimpleQueue[_Worker] = SimpleQueue()
        for _ in range(processes):
            worker = stack.enter_context(_Worker())
            worker.send((serialised, separator))
            idle.put(worker)
        yield from _in_order(blocks, pool, idle, 2 * processes)


def _in_order(blocks, pool: ThreadPoolExecutor, idle: SimpleQueue, in_flight: int) -> Iterator[Block]:
    waiting: deque[Future[Block]] = deque()
    for block in blocks:
        waiting.append(pool.submit(_with_idle_worker, idle, block))
        if len(waiting) >= in_flight:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _with_idle_worker(idle: SimpleQueue, block: list[Fragment]) -> Block:
    worker = idle.get()
    try:
        return worker.encode(block)
    finally:
        idle.put(worker)


def _encoder(serialised: str, separator: int) -> Callable[[list[Fragment]], Block]:
    from codistill.data.tokenizers import encoder_from

    encoder = encoder_from(serialised)
    return lambda block: encode_block(encoder, separator, block)


class _Worker:
    """A process that encodes. Plain pipes rather than multiprocessing, which would run the user's script anew; the
    process ends by itself when this one is gone, because its input then ends."""

    def __init__(self) -> None:
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        # One process is one thread here: the processes already share out the cores.
        alone = {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from codistill.data.encode import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | alone,
        )
        assert self.process.stdin
        assert self.process.stdout
        self.input, self.output = self.process.stdin, self.process.stdout

    def encode(self, block: list[Fragment]) -> Block:
        self.send([tuple(fragment) for fragment in block])
        try:
            return Block(*pickle.load(self.output))
        except (EOFError, pickle.UnpicklingError) as error:
            raise MachineError(
                f"prepare: a worker process died (exit status {self.process.wait()}); {_AGAIN}"
            ) from error

    def send(self, message: object) -> None:
        try:
            pickle.dump(message, self.input, protocol=pickle.HIGHEST_PROTOCOL)
            self.input.flush()
        except BrokenPipeError as error:
            raise MachineError(
                f"prepare: a worker process died (exit status {self.process.wait()}); {_AGAIN}"
            ) from error

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        with suppress(BrokenPipeError):
            self.input.close()
        self.output.close()


def serve() -> None:
    """The loop of a worker process: a tokenizer, then blocks, from standard input; arrays to standard output."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    encode = _encoder(*pickle.load(source))
    while True:
        try:
            block = encode([Fragment(*fragment) for fragment in pickle.load(source)])
        except (EOFError, KeyboardInterrupt):
            return
        pickle.dump((block.tokens, block.unit_ends, block.document_ends), sink, protocol=pickle.HIGHEST_PROTOCOL)
        sink.flush()
