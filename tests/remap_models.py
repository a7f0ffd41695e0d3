"""Random models of every family, in float64 throughout, every parameter drawn, norm gains and biases included."""

import contextlib
from unittest import mock

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)
from transformers.models.llama import modeling_llama
from transformers.models.modernbert import modeling_modernbert

FAMILIES = ("bert", "roberta", "distilbert", "modernbert", "llama", "gpt2")
VOCABULARY = 13
CLASSES = {
    "bert": BertForMaskedLM,
    "roberta": RobertaForMaskedLM,
    "distilbert": DistilBertForMaskedLM,
    "modernbert": ModernBertForMaskedLM,
    "llama": LlamaForCausalLM,
    "gpt2": GPT2LMHeadModel,
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small take longer to hand to a second thread than to work through."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config_of(family, layers=2, width=8, heads=2, ffn=12, **more):
    """A small configuration, dropout off."""
    if family in ("bert", "roberta"):
        kind = BertConfig if family == "bert" else RobertaConfig
        config = kind(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0, **shared(**locals()))
    elif family == "distilbert":
        config = DistilBertConfig(
            vocab_size=VOCABULARY, max_position_embeddings=20, dim=width, n_layers=layers, n_heads=heads,
            hidden_dim=ffn, dropout=0.0, attention_dropout=0.0, **more,
        )  # fmt: skip
    elif family == "modernbert":
        more = {"local_attention": 4} | more
        tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
        config = ModernBertConfig(**tokens, **shared(**{**locals(), "more": more}))
    elif family == "llama":
        more = {"num_key_value_heads": heads} | more
        config = LlamaConfig(**shared(**{**locals(), "more": more}))
    else:
        config = GPT2Config(
            vocab_size=VOCABULARY, n_positions=20, n_embd=width, n_layer=layers, n_head=heads, n_inner=ffn,
            embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0, **more,
        )  # fmt: skip
    return config


def shared(*, layers, width, heads, ffn, more, **_):
    return {
        "vocab_size": VOCABULARY,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": ffn,
        "max_position_embeddings": 20,
        **more,
    }


def build(config, state=None, dtype=torch.float64):
    model = CLASSES[config.model_type](config).to(dtype).eval()
    if state is not None:
        model.load_state_dict(state, strict=True)
    return model


def drawn(config, seed=0, initial_norms=False):
    """A model with every parameter drawn: matrices of order one per output, norms around 1 and biases around 0."""
    model = build(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim == 2:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            elif "norm" in name.lower() or ".ln_" in name:
                base = 1.0 if name.endswith("weight") else 0.0
                parameter.copy_(base + (0.0 if initial_norms else 0.5) * noise)
            else:
                parameter.copy_(0.5 * noise)
    return model


def tokens(length=12, batch=3):
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(7))


def logits(model):
    with torch.no_grad(), double_throughout():
        return model(input_ids=tokens()).logits


def distance(model, other):
    """The largest difference of two models' logits, in standard deviations of the first's."""
    expected = logits(model)
    return ((logits(other) - expected).abs().max() / expected.std()).item()


@contextlib.contextmanager
def double_throughout():
    """Transformers computes rotary positions and RMSNorm in float32 even in a float64 model; here it does not."""

    def rms_norm(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    def turned(q, k, cos, sin, unsqueeze_dim=1):
        return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)

    with (
        mock.patch.object(modeling_llama.LlamaRMSNorm, "forward", rms_norm),
        mock.patch.object(modeling_modernbert, "apply_rotary_pos_emb", turned),
    ):
        yield
