"""Families of masked language models."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch.nn.functional import gelu
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from codistill.config import ModelConfig
from codistill.families.family import Family


def _like_bert(config: ModelConfig, positions: int) -> dict:
    return {
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.feed_forward or 4 * config.width,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "max_position_embeddings": positions,
    }


def _bert(config: ModelConfig, positions: int) -> BertConfig:
    return BertConfig(**_like_bert(config, positions))


def _modernbert(config: ModelConfig, positions: int) -> ModernBertConfig:
    return ModernBertConfig(
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.feed_forward or 3 * config.width // 2,
        attention_dropout=config.dropout,
        mlp_dropout=config.dropout,
        embedding_dropout=config.dropout,
        max_position_embeddings=positions,
    )


def _roberta(config: ModelConfig, positions: int) -> RobertaConfig:
    return RobertaConfig(**_like_bert(config, positions), type_vocab_size=1)


def _distilbert(config: ModelConfig, positions: int) -> DistilBertConfig:
    return DistilBertConfig(
        dim=config.width,
        n_layers=config.layers,
        n_heads=config.num_heads,
        hidden_dim=config.feed_forward or 4 * config.width,
        dropout=config.dropout,
        attention_dropout=config.dropout,
        max_position_embeddings=positions,
    )


def _electra(config: ModelConfig, positions: int) -> ElectraConfig:
    return ElectraConfig(**_like_bert(config, positions), embedding_size=config.width)


def _deberta(config: ModelConfig, positions: int) -> DebertaV2Config:
    """As DeBERTa-v3: relative positions in buckets, and the head that its published weights fit."""
    relative: dict[str, Any] = {
        "relative_attention": True,
        "position_buckets": 256,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
    }
    return DebertaV2Config(**_like_bert(config, positions), **relative, legacy=False)


MASKED: Mapping[str, Family] = {
    "bert": Family(BertForMaskedLM, "mlm", "bert", "cls.predictions.transform", "cls.predictions.decoder", _bert),
    "modernbert": Family(ModernBertForMaskedLM, "mlm", "model", "head", "decoder", _modernbert),
    "roberta": Family(
        RobertaForMaskedLM,
        "mlm",
        "roberta",
        ("lm_head.dense", gelu, "lm_head.layer_norm"),
        "lm_head.decoder",
        _roberta,
        counts_from_padding=True,
    ),
    "distilbert": Family(
        DistilBertForMaskedLM,
        "mlm",
        "distilbert",
        ("vocab_transform", "activation", "vocab_layer_norm"),
        "vocab_projector",
        _distilbert,
    ),
    "electra": Family(ElectraForMaskedLM, "mlm", "electra", "generator_predictions", "generator_lm_head", _electra),
    "deberta-v2": Family(
        DebertaV2ForMaskedLM,
        "mlm",
        "deberta",
        ("lm_predictions.lm_head.dense", "lm_predictions.lm_head.transform_act_fn", "lm_predictions.lm_head.LayerNorm"),
        "deberta.embeddings.word_embeddings",
        _deberta,
        bias="lm_predictions.lm_head.bias",
    ),
}

# The other head of a family that has two, which a configuration with `legacy: true` asks for.
MASKED_LEGACY: Mapping[str, Family] = {
    "deberta-v2": replace(
        MASKED["deberta-v2"], transform="cls.predictions.transform", output="cls.predictions.decoder", bias=None
    ),
}
