"""What is predicted: an objective names the rows to predict and their labels, and nothing else.

Heads are applied to those rows only, so masked, causal and classification objectives share every loss: no ignore
index, no shift. Shape suffixes: B sequences, T position, N predicted rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """What one micro-step consumes.

    `inputs`: keyword arguments of a backbone, `input_ids` (B, T) int64 among them; `rows_N`: int64 indices into the
    flattened (B · T) positions; `labels_N`: int64 token ids; `row_weight_N`: float32, 0 for a slot that a short
    sequence leaves unfilled (None: all 1); `sample_ids`: which rows of the data these are, for error messages.
    """

    inputs: Mapping[str, Tensor]
    rows_N: Tensor
    labels_N: Tensor
    row_weight_N: Tensor | None = None
    sample_ids: tuple[int, ...] = ()
