"""One process, data parallelism (DDP) or sharded data parallelism (FSDP2), behind one door.

    ranks = start("auto")                     # under torchrun: one process per device
    ranks.place(module)                       # same parameters everywhere, or a shard of them
    for micro_batch in share_of_this_rank:
        ranks.before_backward([module], is_last=...)
        loss.backward()                       # of a loss that is divided by the rows of all ranks
    ranks.reduce([module.parameters()])       # gradients become sums over the ranks

Gradients are summed, never averaged: losses are divided by the global number of rows. There is no wrapper around a
module, so a weight that is used outside its forward (an output embedding in a fused loss) is reduced like any other.
Nothing here knows what a member is.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from codistill.errors import FailedElsewhere, MachineError, UserError
from codistill.files import machine_error
from codistill.torchrun import Engine, connected, device_of, engine_of

Result = TypeVar("Result")

_BUCKET_BYTES = 32 * 2**20
_MESSAGE_BYTES = 1000


@dataclass
class Ranks:
    """The processes of a run, seen from one of them: rank `rank` of `world`, computing on `device`.

    `control` is a group over the host network: what goes over it never waits for a device.
    """

    engine: Engine = "single"
    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    control: dist.ProcessGroup | None = None
    _asked: tuple[dist.Work, Tensor] | None = field(default=None, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    # ---- modules and gradients ------------------------------------------------------------------

    def place(self, module: nn.Module) -> None:
        """Gives every rank rank 0's parameters and buffers; under FSDP2 then leaves it a shard of each parameter.

        Shards are made per layer (each element of an outermost ModuleList) and of the rest. Make optimizers after it.
        """
        if self.engine == "single":
            return
        with torch.no_grad():
            for tensor in [*module.parameters(), *module.buffers()]:
                dist.broadcast(tensor, 0)
        if self.engine == "fsdp2":
            self._shard(module)

    def _shard(self, module: nn.Module) -> None:
        mesh = dist.init_device_mesh(self.device.type, (self.world,))
        for part in [*layers(module), module]:
            sharded = fully_shard(part, mesh=mesh)
            sharded.set_gradient_divide_factor(1.0)  # a sum, not a mean,
            sharded.set_force_sum_reduction_for_comms(True)  # in words that every backend understands

    def before_backward(self, modules: Iterable[nn.Module], *, is_last: bool) -> None:
        """Says whether the backward pass to come is a step's last: those before it exchange no gradients."""
        for module in modules:
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(is_last)

    def gather(self, module: nn.Module) -> None:
        """Puts together what is of no layer (embeddings and head) of a module whose forward is not run under FSDP2."""
        if isinstance(module, FSDPModule):
            module.unshard()

    def release(self, modules: Iterable[nn.Module]) -> None:
        """Drops the whole parameters that a forward without a backward leaves behind under FSDP2."""
        for module in modules:
            if isinstance(module, FSDPModule):
                module.reshard()

    def reduce(self, parameters: Iterable[Sequence[Tensor]]) -> None:
        """Sums the gradients of each group of parameters over the ranks, after the last backward pass.

        Under FSDP2 the backward pass has done it. Buckets hold one group's gradients only, so that no bit depends on
        which groups there are.
        """
        if self.engine != "ddp":
            return
        pending = [_summing(bucket) for group in parameters for bucket in _buckets(group)]
        for bucket, flat, work in pending:
            work.wait()
            for parameter, gradient in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                parameter.grad = gradient.view_as(parameter)

    def clip(self, groups: Sequence[tuple[Sequence[Tensor], float]]) -> list[Tensor]:
        """Bounds the norm of each group's gradient, for (parameters, bound); returns the norms before, 0-d tensors."""
        if self.engine != "fsdp2":
            return [nn.utils.clip_grad_norm_(parameters, bound) for parameters, bound in groups]
        shards = [[_local(p.grad) for p in parameters if p.grad is not None] for parameters, _ in groups]
        norms_M = self.norms(shards)
        for of_group, (_, bound), norm in zip(shards, groups, norms_M, strict=True):
            torch._foreach_mul_(of_group, (bound / (norm + 1e-6)).clamp(max=1.0))
        return norms_M

    def norms(self, groups: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """The norm of each group of tensors, shards on other ranks included, as 0-d tensors on the device."""
        norms = [nn.utils.get_total_norm([_local(tensor.detach()) for tensor in group]) for group in groups]
        return norms if self.engine != "fsdp2" else list(self._sum(torch.stack(norms).square()).sqrt())

    # ---- scalars and words ----------------------------------------------------------------------

    def sum(self, scalars: Sequence[Tensor]) -> list[Tensor]:
        """Each 0-d tensor summed over the ranks, in one exchange on the device."""
        return list(scalars) if self.world == 1 else list(self._sum(torch.stack(list(scalars))))

    def sum_on_host(self, rows: Tensor) -> Tensor:
        """`rows`, each set by one rank and zero on the others, with all of them set: exact."""
        if self.world > 1:
            dist.all_reduce(rows, group=self.control)
        return rows

    def any_late(self, flag: bool) -> bool:
        """Whether any rank had said yes at the call before this one: all ranks get the same answer at the same call.

        It is one call late so that nobody waits for the network. A process alone is answered at once.
        """
        if self.world == 1:
            return flag
        said = torch.tensor(int(flag))
        asked, self._asked = self._asked, (self._any(said), said)
        if asked is None:
            return False
        asked[0].wait()
        return bool(asked[1])

    def together(self, work: Callable[[], Result]) -> Result:
        """What `work` gives, once all ranks have done it. Where one fails, all do: rank 0 raises the first error, and
        every other rank `FailedElsewhere`."""
        if self.world == 1:
            return work()
        failure: UserError | MachineError | None = None
        result = None
        try:
            result = work()
        except OSError as error:
            failure = machine_error(error, Path(error.filename or os.curdir))
        except (UserError, MachineError) as error:
            failure = error
        said = self._all_gather_text("" if failure is None else f"{type(failure).__name__}:{failure}")
        failed = [rank for rank, words in enumerate(said) if words]
        if not failed:
            return cast(Result, result)
        kind, _, words = said[failed[0]].partition(":")
        status, error_type = (1, MachineError) if kind == "MachineError" else (2, UserError)
        if not self.is_main:
            raise FailedElsewhere(status) from failure
        raise failure or error_type(f"rank {failed[0]}: {words}")

    def on_main(self, work: Callable[[], None]) -> None:
        """Rank 0 does `work`, the others wait; where it fails, all do."""
        self.together(work if self.is_main else lambda: None)

    def broadcast_int(self, value: int) -> int:
        """Rank 0's `value`, on every rank."""
        if self.world > 1:
            tensor = torch.tensor(value)
            dist.broadcast(tensor, 0, group=self.control)
            value = int(tensor)
        return value

    def check_same(self, words: str, what: str) -> None:
        """Unless all ranks give the same words, raises UserError on rank 0 and `FailedElsewhere` on the others."""
        if self.world == 1:
            return
        digest = hashlib.blake2b(words.encode(), digest_size=16).hexdigest()  # for words too long to be told
        said = self._all_gather_text(f"{digest}{words}")
        odd = next((rank for rank, other in enumerate(said) if other != said[0]), None)
        if odd is None:
            return
        if not self.is_main:
            raise FailedElsewhere(2)
        one, other = (said[rank][len(digest) :] for rank in (odd, 0))
        raise UserError(f"{what}: rank {odd} has {one}, rank 0 has {other}; give every node the same")

    # ---- parts ----------------------------------------------------------------------------------

    def _sum(self, values: Tensor) -> Tensor:
        summed = values.detach().clone()
        dist.all_reduce(summed)
        return summed

    def _any(self, said: Tensor) -> dist.Work:
        return cast(dist.Work, dist.all_reduce(said, dist.ReduceOp.MAX, group=self.control, async_op=True))

    def _all_gather_text(self, words: str) -> list[str]:
        """Everybody's words, by rank, as plain bytes: nothing is pickled."""
        content = words.encode()[:_MESSAGE_BYTES]
        mine = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8)
        mine[: len(content)] = torch.frombuffer(bytearray(content or b"\0"), dtype=torch.uint8)[: len(content)]
        all_words = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(all_words, mine, group=self.control)
        return [bytes(tensor.tolist()).rstrip(b"\0").decode(errors="replace") for tensor in all_words]


ALONE = Ranks()


def start(engine: str = "auto", device: str | None = None) -> Ranks:
    """The processes that torchrun started, connected until they end, as seen from this one.

    `engine`: auto is ddp where torchrun started several processes, else single. `device`: cpu, cuda or cuda:N, by
    default a GPU of this process's own if there is one. Raises UserError for what does not fit together.
    """
    chosen = engine_of(engine)
    place = device_of(device, chosen)
    if chosen == "single":
        if place.index is not None:
            torch.cuda.set_device(place)  # so that what asks for "the GPU" (synchronising, Triton) means this one
        return Ranks(device=place)
    control = connected(place.type)
    return Ranks(chosen, dist.get_rank(), dist.get_world_size(), place, control)


def whole(tensor: Tensor) -> Tensor:
    """`tensor` with the shards of all ranks, which must all ask for it in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(whole_tensor: Tensor, tensor: Tensor) -> Tensor:
    """Of `whole_tensor`, which every rank has, what `tensor` holds of itself on this rank; nothing is communicated."""
    moved = whole_tensor.to(tensor.device)
    if not isinstance(tensor, DTensor):
        return moved
    return distribute_tensor(moved, tensor.device_mesh, tensor.placements, src_data_rank=None)


# ---- gradients ---------------------------------------------------------------------------------


def layers(module: nn.Module) -> list[nn.Module]:
    """The repeated layers of a model: the elements of its outermost ModuleLists that have parameters."""
    if isinstance(module, nn.ModuleList):
        return [layer for layer in module if any(True for _ in layer.parameters())]
    return [layer for child in module.children() for layer in layers(child)]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _buckets(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """Parameters that have a gradient, about `_BUCKET_BYTES` of them in a list."""
    buckets: list[list[Tensor]] = []
    size: float = math.inf
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if size >= _BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.grad.nbytes
    return buckets


def _summing(bucket: list[Tensor]) -> tuple[list[Tensor], Tensor, dist.Work]:
    flat = torch.cat([cast(Tensor, parameter.grad).reshape(-1) for parameter in bucket])
    return bucket, flat, cast(dist.Work, dist.all_reduce(flat, async_op=True))
