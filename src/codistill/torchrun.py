"""What torchrun started: this process's engine and device, its connection with the others, and the end of that."""

import atexit
import gc
import os
import socket
from contextlib import suppress
from datetime import timedelta
from functools import _lru_cache_wrapper, cache
from typing import Literal, cast

import torch
import torch.distributed as dist

from codistill.errors import UserError

Engine = Literal["single", "ddp", "fsdp2"]

# Ranks wait for one another while one of them turns text into tokens; a dead peer is noticed at once all the same.
_PATIENCE = timedelta(days=1)


def restarted() -> bool:
    """Whether torchrun has started this process anew because one of its processes had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def job() -> str:
    """What tells the job of this process from others: the agent that started it, or itself where there is none."""
    agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()
    return f"{socket.gethostname()} {agent} {os.environ.get('TORCHELASTIC_RUN_ID', '')}"


def engine_of(asked: str) -> Engine:
    """The engine `asked` for, auto resolved; raises UserError where it does not fit what was started."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if asked == "auto":
        return "ddp" if world > 1 else "single"
    if asked == "single" and world > 1:
        raise UserError(f"distributed: single, but torchrun started {world} processes; use auto, ddp or fsdp2")
    if asked != "single" and "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"distributed: {asked} needs several processes; start them with "
            "`torchrun --nproc-per-node=N --no-python codistill train …`, or use auto"
        )
    return cast(Engine, asked)


def device_of(asked: str | None, engine: Engine) -> torch.device:
    """This process's own device; raises UserError for one that there is not."""
    try:
        device = torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"--device {asked}: there is no such device; give cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {asked}: {device.type} is not supported; give cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {asked}: PyTorch sees {torch.cuda.device_count()} GPUs here; give another, or cpu")
    if engine == "single" or device.type != "cuda":
        return device
    if device.index is not None:
        raise UserError(f"--device {asked}: torchrun gives each process a GPU of its own; give cuda, or leave it out")
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > (count := torch.cuda.device_count()):
        raise UserError(f"torchrun --nproc-per-node: this node has {count} GPUs; start at most one process for each")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@cache
def connected(device_type: str) -> dist.ProcessGroup:
    """The group over the host network. Connects once in a process's life: a second attempt would find the addresses of
    the first."""
    if not dist.is_initialized():
        if device_type == "cuda":
            place = device_of("cuda", "ddp")
            torch.cuda.set_device(place)
            dist.init_process_group("cpu:gloo,cuda:nccl", device_id=place)
        else:
            dist.init_process_group("gloo")
        atexit.register(_disconnect)
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_PATIENCE))


def _disconnect() -> None:
    """Ends the groups, and with them gloo's threads: one that lets go of a tensor only when Python ends would take the
    process with it, long after its work was done (pytorch/pytorch issue 190489)."""
    connected.cache_clear()
    if dist.is_initialized():  # a loop of one's own may have ended it
        dist.destroy_process_group()
    # DTensor's caches hold FSDP2's group for good: those that Python keeps for it, and two of its own.
    for cached in [each for each in gc.get_objects() if type(each) is _lru_cache_wrapper]:  # asks no proxy what it is
        if cached.__module__.startswith("torch.distributed."):
            cached.cache_clear()
    with suppress(ImportError):
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        _clear_sharding_prop_cache()
    with suppress(ImportError):
        from torch.distributed.tensor._redistribute import clear_redistribute_planner_cache

        clear_redistribute_planner_cache()
    gc.collect()
