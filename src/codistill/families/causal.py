"""Families of causal language models.

Their feed-forward layers are gated (except GPT-2's), 3 · width where the configuration does not say: Qwen3's ratio.
"""

from collections.abc import Mapping
from typing import Any

from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from codistill.config import ModelConfig
from codistill.families.family import Family


def _gpt2(config: ModelConfig, positions: int) -> GPT2Config:
    return GPT2Config(
        n_embd=config.width,
        n_layer=config.layers,
        n_head=config.num_heads,
        n_inner=config.feed_forward or 4 * config.width,
        embd_pdrop=config.dropout,
        resid_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        n_positions=positions,
    )


def _llama(config: ModelConfig, positions: int) -> LlamaConfig:
    return LlamaConfig(**_gated(config, positions))


def _qwen2(config: ModelConfig, positions: int) -> Qwen2Config:
    return Qwen2Config(**_gated(config, positions))


def _qwen3(config: ModelConfig, positions: int) -> Qwen3Config:
    return Qwen3Config(**_gated(config, positions), head_dim=config.width // config.num_heads)


def _gemma3(config: ModelConfig, positions: int) -> Gemma3TextConfig:
    head = config.width // config.num_heads
    return Gemma3TextConfig(**_gated(config, positions), head_dim=head, query_pre_attn_scalar=head)


def _gated(config: ModelConfig, positions: int) -> dict[str, Any]:
    return {
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.key_value_heads or config.num_heads,
        "intermediate_size": config.feed_forward or 3 * config.width,
        "attention_dropout": config.dropout,
        "max_position_embeddings": positions,
        "tie_word_embeddings": True,
    }


CAUSAL: Mapping[str, Family] = {
    "gpt2": Family(GPT2LMHeadModel, "clm", "transformer", None, "lm_head", _gpt2),
    "llama": Family(LlamaForCausalLM, "clm", "model", None, "lm_head", _llama),
    "qwen2": Family(Qwen2ForCausalLM, "clm", "model", None, "lm_head", _qwen2),
    "qwen3": Family(Qwen3ForCausalLM, "clm", "model", None, "lm_head", _qwen3),
    "gemma3_text": Family(Gemma3ForCausalLM, "clm", "model", None, "lm_head", _gemma3),
}
