"""The families that can be remapped, one line a tensor; the notation is that of `architectures`."""

from typing import Any

from codistill.errors import UserError
from codistill.remap.architectures import Architecture

_BERT_LAYER = {
    "attention.self.query.weight": "query <stream",
    "attention.self.query.bias": "query",
    "attention.self.key.weight": "key <stream",
    "attention.self.key.bias": "key",
    "attention.self.value.weight": "value <stream",
    "attention.self.value.bias": "value",
    "attention.output.dense.weight": "stream <attended",
    "attention.output.dense.bias": "stream",
    "attention.output.LayerNorm.weight": "stream>stream",
    "attention.output.LayerNorm.bias": ">stream",
    "intermediate.dense.weight": "ffn <stream",
    "intermediate.dense.bias": "ffn",
    "output.dense.weight": "stream <ffn",
    "output.dense.bias": "stream",
    "output.LayerNorm.weight": "stream>stream",
    "output.LayerNorm.bias": ">stream",
}


def _bert_embeddings(model: str) -> dict[str, str]:
    return {
        f"{model}.embeddings.word_embeddings.weight": "vocabulary stream",
        f"{model}.embeddings.position_embeddings.weight": "positions stream",
        f"{model}.embeddings.token_type_embeddings.weight": "types stream",
        f"{model}.embeddings.LayerNorm.weight": "stream>stream",
        f"{model}.embeddings.LayerNorm.bias": ">stream",
    }


BERT = Architecture(
    model_class="BertForMaskedLM",
    prefix="bert.",
    layers="bert.encoder.layer.{}.",
    outside=_bert_embeddings("bert")
    | {
        "cls.predictions.bias": "vocabulary",
        "cls.predictions.transform.dense.weight": "head <stream",
        "cls.predictions.transform.dense.bias": "head",
        "cls.predictions.transform.LayerNorm.weight": "head>features",
        "cls.predictions.transform.LayerNorm.bias": ">features",
        "cls.predictions.decoder.weight": "vocabulary <features",
        "cls.predictions.decoder.bias": "vocabulary",
    },
    layer=_BERT_LAYER,
    aliases={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    ignored=("pooler.", "cls.seq_relationship.", "embeddings.position_ids"),
    output_norm=("output.LayerNorm.weight", "output.LayerNorm.bias"),
)

ROBERTA = Architecture(
    model_class="RobertaForMaskedLM",
    prefix="roberta.",
    layers="roberta.encoder.layer.{}.",
    outside=_bert_embeddings("roberta")
    | {
        "lm_head.bias": "vocabulary",
        "lm_head.dense.weight": "head <stream",
        "lm_head.dense.bias": "head",
        "lm_head.layer_norm.weight": "head>features",
        "lm_head.layer_norm.bias": ">features",
        "lm_head.decoder.weight": "vocabulary <features",
        "lm_head.decoder.bias": "vocabulary",
    },
    layer=_BERT_LAYER,
    aliases={
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
    ignored=("pooler.", "embeddings.position_ids"),
    output_norm=("output.LayerNorm.weight", "output.LayerNorm.bias"),
)

DISTILBERT = Architecture(
    model_class="DistilBertForMaskedLM",
    prefix="distilbert.",
    layers="distilbert.transformer.layer.{}.",
    outside={
        "distilbert.embeddings.word_embeddings.weight": "vocabulary stream",
        "distilbert.embeddings.position_embeddings.weight": "positions stream",
        "distilbert.embeddings.LayerNorm.weight": "stream>stream",
        "distilbert.embeddings.LayerNorm.bias": ">stream",
        "vocab_transform.weight": "head <stream",
        "vocab_transform.bias": "head",
        "vocab_layer_norm.weight": "head>features",
        "vocab_layer_norm.bias": ">features",
        "vocab_projector.weight": "vocabulary <features",
        "vocab_projector.bias": "vocabulary",
    },
    layer={
        "attention.q_lin.weight": "query <stream",
        "attention.q_lin.bias": "query",
        "attention.k_lin.weight": "key <stream",
        "attention.k_lin.bias": "key",
        "attention.v_lin.weight": "value <stream",
        "attention.v_lin.bias": "value",
        "attention.out_lin.weight": "stream <attended",
        "attention.out_lin.bias": "stream",
        "sa_layer_norm.weight": "stream>stream",
        "sa_layer_norm.bias": ">stream",
        "ffn.lin1.weight": "ffn <stream",
        "ffn.lin1.bias": "ffn",
        "ffn.lin2.weight": "stream <ffn",
        "ffn.lin2.bias": "stream",
        "output_layer_norm.weight": "stream>stream",
        "output_layer_norm.bias": ">stream",
    },
    aliases={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
    ignored=("embeddings.position_ids",),
    output_norm=("output_layer_norm.weight", "output_layer_norm.bias"),
)

MODERNBERT = Architecture(
    model_class="ModernBertForMaskedLM",
    prefix="model.",
    layers="model.layers.{}.",
    outside={
        "model.embeddings.tok_embeddings.weight": "vocabulary stream",
        "model.embeddings.norm.weight": "stream>stream",
        "model.embeddings.norm.bias": ">stream ?norm_bias",
        "model.final_norm.weight": "stream>normed",
        "model.final_norm.bias": ">normed ?norm_bias",
        "head.dense.weight": "head <normed",
        "head.dense.bias": "head ?classifier_bias",
        "head.norm.weight": "head>features",
        "head.norm.bias": ">features ?norm_bias",
        "decoder.weight": "vocabulary <features",
        "decoder.bias": "vocabulary ?decoder_bias",
    },
    layer={
        "attn_norm.weight": "stream>normed",
        "attn_norm.bias": ">normed ?norm_bias",
        "attn.Wqkv.weight": "query+key+value <normed",
        "attn.Wqkv.bias": "query+key+value ?attention_bias",
        "attn.Wo.weight": "stream <attended",
        "attn.Wo.bias": "stream ?attention_bias",
        "mlp_norm.weight": "stream>normed",
        "mlp_norm.bias": ">normed ?norm_bias",
        "mlp.Wi.weight": "ffn+ffn <normed",
        "mlp.Wi.bias": "ffn+ffn ?mlp_bias",
        "mlp.Wo.weight": "stream <ffn",
        "mlp.Wo.bias": "stream ?mlp_bias",
    },
    aliases={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
    rotary=True,
    first_layer={"attn.Wqkv.weight": "query+key+value <stream"},
    first_layer_lacks={"attn_norm.weight": "attn.Wqkv.weight", "attn_norm.bias": "attn.Wqkv.bias"},
)

LLAMA = Architecture(
    model_class="LlamaForCausalLM",
    prefix="model.",
    layers="model.layers.{}.",
    outside={
        "model.embed_tokens.weight": "vocabulary stream",
        "model.norm.weight": "stream>features",
        "lm_head.weight": "vocabulary <features",
    },
    layer={
        "input_layernorm.weight": "stream>normed",
        "self_attn.q_proj.weight": "query <normed",
        "self_attn.q_proj.bias": "query ?attention_bias",
        "self_attn.k_proj.weight": "key <normed",
        "self_attn.k_proj.bias": "key ?attention_bias",
        "self_attn.v_proj.weight": "value <normed",
        "self_attn.v_proj.bias": "value ?attention_bias",
        "self_attn.o_proj.weight": "stream <attended",
        "self_attn.o_proj.bias": "stream ?attention_bias",
        "post_attention_layernorm.weight": "stream>normed",
        "mlp.gate_proj.weight": "ffn <normed",
        "mlp.gate_proj.bias": "ffn ?mlp_bias",
        "mlp.up_proj.weight": "ffn <normed",
        "mlp.up_proj.bias": "ffn ?mlp_bias",
        "mlp.down_proj.weight": "stream <ffn",
        "mlp.down_proj.bias": "stream ?mlp_bias",
    },
    aliases={"lm_head.weight": "model.embed_tokens.weight"},
    ignored=("rotary_emb.inv_freq",),
    centring=False,
    rotary=True,
)

GPT2 = Architecture(
    model_class="GPT2LMHeadModel",
    prefix="transformer.",
    layers="transformer.h.{}.",
    outside={
        "transformer.wte.weight": "vocabulary stream",
        "transformer.wpe.weight": "positions stream",
        "transformer.ln_f.weight": "stream>features",
        "transformer.ln_f.bias": ">features",
        "lm_head.weight": "vocabulary <features",
    },
    layer={  # its matrices are stored (in, out)
        "ln_1.weight": "stream>normed",
        "ln_1.bias": ">normed",
        "attn.c_attn.weight": "<normed query+key+value",
        "attn.c_attn.bias": "query+key+value",
        "attn.c_proj.weight": "<attended stream",
        "attn.c_proj.bias": "stream",
        "ln_2.weight": "stream>normed",
        "ln_2.bias": ">normed",
        "mlp.c_fc.weight": "<normed ffn",
        "mlp.c_fc.bias": "ffn",
        "mlp.c_proj.weight": "<ffn stream",
        "mlp.c_proj.bias": "stream",
    },
    aliases={"lm_head.weight": "transformer.wte.weight"},
    ignored=(".attn.bias", ".attn.masked_bias"),
)

ARCHITECTURES = {
    "bert": BERT,
    "roberta": ROBERTA,
    "distilbert": DISTILBERT,
    "modernbert": MODERNBERT,
    "llama": LLAMA,
    "gpt2": GPT2,
}


def describe(config: Any) -> Architecture:
    """The description of a Hugging Face configuration's family. Raises `UserError` for one that is not described."""
    if config.model_type not in ARCHITECTURES:
        raise UserError(f"cannot remap a {config.model_type!r} model: described are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[config.model_type]
