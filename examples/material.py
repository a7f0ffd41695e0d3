"""Stand-ins for your own models and data, small enough to run in a moment."""

import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForMaskedLM

VOCABULARY = 100


def bert(layers: int) -> BertForMaskedLM:
    """A masked LM of 32 units, at random."""
    shape = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}
    return BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, **shape))


def loader() -> DataLoader:
    """Eight batches as Hugging Face's collators make them: labels are -100 where nothing is predicted."""
    ids = torch.randint(5, VOCABULARY, (32, 16), generator=torch.Generator().manual_seed(0))
    chosen = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.15
    rows = [
        {"input_ids": row.where(~masked, 4), "attention_mask": torch.ones_like(row), "labels": row.where(masked, -100)}
        for row, masked in zip(ids, chosen, strict=True)
    ]
    return DataLoader(rows, batch_size=4)
