"""Independent batches over the cores of a CPU: small models are too small to be worth splitting within a product."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def spread(work: Callable[[Item], Result], items: Iterable[Item], device: torch.device) -> Iterator[Result]:
    """work(item) of each item in order, without gradients: on a CPU as many at once as PyTorch has threads, each of
    them on a single one, so that no bit depends on how many there are."""
    threads = torch.get_num_threads()
    if device.type != "cpu":
        yield from map(partial(_alone, work), items)
        return
    try:
        torch.set_num_threads(1)
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(partial(_alone, work), items)
    finally:
        torch.set_num_threads(threads)


def _alone(work: Callable[[Item], Result], item: Item) -> Result:
    with torch.inference_mode():  # the mode is a thread's own
        return work(item)
