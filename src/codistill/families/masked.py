"""Families of masked language models."""

from collections.abc import Mapping

from transformers import BertConfig, BertForMaskedLM, ModernBertConfig, ModernBertForMaskedLM

from codistill.config import ModelConfig
from codistill.families.family import Family, heads


def _bert(config: ModelConfig, positions: int) -> BertConfig:
    return BertConfig(
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=heads(config),
        intermediate_size=config.feed_forward or 4 * config.width,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
        max_position_embeddings=positions,
    )


def _modernbert(config: ModelConfig, positions: int) -> ModernBertConfig:
    return ModernBertConfig(
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=heads(config),
        intermediate_size=config.feed_forward or 3 * config.width // 2,
        attention_dropout=config.dropout,
        mlp_dropout=config.dropout,
        embedding_dropout=config.dropout,
        max_position_embeddings=positions,
    )


MASKED: Mapping[str, Family] = {
    "bert": Family(BertForMaskedLM, "mlm", "bert", "cls.predictions.transform", "cls.predictions.decoder", _bert),
    "modernbert": Family(ModernBertForMaskedLM, "mlm", "model", "head", "decoder", _modernbert),
}
