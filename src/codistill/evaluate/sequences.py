"""A language model that predicts one class or one number of a whole text.

Shape suffixes: B sequences, T position, D width, N predicted rows, C classes.
"""

from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from codistill.attention import unread_masks
from codistill.models import call_options


class SequencePredictor(nn.Module):
    """The backbone of a language model with a new head: it takes the place of `models.Predictor` in a cohort.

    `forward(inputs, rows_N)` gives features (N, D) of the sequences `rows_N` of the batch; outputs are
    features @ `output_weight`ᵀ + `output_bias`, one a class, or a single number. `pooling`: the mean over the tokens,
    the first one, or (causal models) the last. The model itself is copied, and not changed.
    """

    is_from_module = True  # as of `models.Predictor`: what it predicts is the task's to say

    def __init__(self, model: PreTrainedModel, outputs: int, *, pooling: str, dropout: float, seed: int):
        super().__init__()
        self.backbone = deepcopy(model.base_model)
        width = model.config.hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            dense, self.output = nn.Linear(width, width), nn.Linear(width, outputs)
            for layer in (dense, self.output):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.head = nn.Sequential(nn.Dropout(dropout), dense, nn.Tanh(), nn.Dropout(dropout))
        self.pooling, self.vocabulary = pooling, outputs
        self._options = call_options(model)
        self._has_types = getattr(model.config, "type_vocab_size", 1) > 1

    def forward(self, inputs: Mapping[str, Tensor], rows_N: Tensor) -> Tensor:
        # A cohort's members may be of different families, and not all are told which of two texts a token is of.
        wanted = {name: tensor for name, tensor in inputs.items() if self._has_types or name != "token_type_ids"}
        with unread_masks(wanted, rows_N.device):
            hidden_BTD = self.backbone(**wanted, **self._options).last_hidden_state
        pooled_BD = _pooled(hidden_BTD, inputs.get("attention_mask"), self.pooling)
        return self.head(pooled_BD.index_select(0, rows_N))

    @property
    def model(self) -> nn.Module:
        """What edges below the logits look into."""
        return self.backbone

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.output.weight.device

    @property
    def output_weight(self) -> Tensor:
        """(C, D)."""
        return self.output.weight

    @property
    def output_bias(self) -> Tensor:
        """(C,)."""
        return self.output.bias


def _pooled(hidden_BTD: Tensor, mask_BT: Tensor | None, pooling: str) -> Tensor:
    if pooling == "first":
        return hidden_BTD[:, 0]
    if mask_BT is None:
        return hidden_BTD.mean(1) if pooling == "mean" else hidden_BTD[:, -1]
    if pooling == "last":
        last_B = mask_BT.sum(1) - 1
        return hidden_BTD[torch.arange(len(last_B), device=last_B.device), last_B]
    weight_BT1 = mask_BT.unsqueeze(-1).to(hidden_BTD.dtype)
    return (hidden_BTD * weight_BT1).sum(1) / weight_BT1.sum(1)
