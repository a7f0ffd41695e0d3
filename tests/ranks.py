"""Several processes connected by gloo, for tests: `on_ranks(work, …)` gives what `work(…)` gave on each."""

import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import torch

# Imports torch and transformers once; each process is then a fork of a small, single-threaded server.
_CONTEXT = multiprocessing.get_context("forkserver")
_SECONDS = 120


def _start_server() -> None:
    _CONTEXT.set_forkserver_preload(["codistill.train", "cohorts"])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # of which the preload hears no other way
        forkserver.ensure_running()


def on_ranks(work: Callable[..., Any], *args: Any, world: int = 2) -> list[Any]:
    """What `work(*args)` returned on each rank: tensors, numbers and words, in lists and dictionaries."""
    _start_server()
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        processes = [
            _CONTEXT.Process(target=_one, args=(rank, world, port, folder, {**os.environ}, work, args))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(_SECONDS)
        for process in processes:
            if process.is_alive():
                process.kill()
        problems = [file.read_text() for file in sorted(Path(folder).glob("*.error"))]
        assert not problems, "\n".join(problems)
        assert [process.exitcode for process in processes] == [0] * world, "a rank hung or died"
        return [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(world)]


def _one(rank: int, world: int, port: int, folder: str, environment: dict, work: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    os.environ.update(environment)  # the server's own is as it was when it started
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        torch.save(work(*args), f"{folder}/{rank}.pt")
    except BaseException:
        Path(f"{folder}/{rank}.error").write_text(f"rank {rank}\n{traceback.format_exc()}")
