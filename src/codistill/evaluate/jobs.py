"""What has to be computed: jobs of one or more cells, each with the keys of its cells.

A job's `compute` gives one dictionary per cell: score, scores, predictions, labels, counted (see `results.Cell`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from codistill.evaluate.results import Cell

Progress = Callable[[int], None]
Content = dict[str, Any]


@dataclass
class Job:
    """`cells`, not computed yet, and the `keys` of their content; `cost`: about how many examples it takes."""

    cells: Sequence[Cell]
    keys: Sequence[str]
    cost: int
    compute: Callable[[Progress], list[Content]]
