"""`init` from models that others have made: all that no setting of a run can say is as the source has it.

The oracle is the source itself, as transformers loads it from its folder.
"""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    RobertaConfig,
)

from codistill.build import build
from codistill.data.tokenizers import load_tokenizer, vocabulary_size
from codistill.errors import UserError
from codistill.loading import load, override, to_dict
from codistill.plan import plan
from runs import small_run

CPU = torch.device("cpu")
NAMED = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
SIZES = {"layers": 2, "width": 32, "heads": 2, "feed_forward": 48}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}


def llama(**more):
    return LlamaConfig(**{**NAMED, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": True, **more})


def modernbert(**more):
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    return ModernBertConfig(**{**NAMED, **ids, **more})


def bert(**more):
    return BertConfig(**{**NAMED, **more})


SOURCES = {
    "a rotary base and an epsilon": (
        llama(rope_parameters={"rope_type": "default", "rope_theta": 1e6}, rms_norm_eps=0.1),
        {"layers": 4, "width": 64, "heads": 4, "feed_forward": 96},
    ),
    "scaled rotary positions": (
        llama(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
        {"layers": 3, "width": 64, "heads": 4},
    ),
    "yarn": (llama(rope_parameters=YARN, max_position_embeddings=64), {"layers": 3}),
    "untied, grouped queries, rows beyond the vocabulary": (
        llama(tie_word_embeddings=False, num_key_value_heads=1, vocab_size=320),
        {"width": 64, "heads": 4, "layers": 3},
    ),
    "heads of another width, biases, another activation": (
        llama(head_dim=32, attention_bias=True, mlp_bias=True, hidden_act="gelu"),
        {"layers": 3, "width": 64, "feed_forward": 96},
    ),
    "a window, an epsilon and two rotary bases": (
        modernbert(
            local_attention=6,
            norm_eps=0.1,
            norm_bias=True,
            rope_parameters={
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
        ),
        {"layers": 4, "width": 64, "heads": 4},
    ),
    "every second layer global": (modernbert(local_attention=6, global_attn_every_n_layers=2), {"layers": 5}),
    "layers of no pattern": (
        modernbert(local_attention=6, layer_types=["sliding_attention", "full_attention"]),
        {"layers": 4},
    ),
    "40 positions, another activation, rows beyond the vocabulary": (
        bert(max_position_embeddings=40, hidden_act="gelu_new", vocab_size=304, type_vocab_size=3),
        {"layers": 3, "width": 64, "heads": 4, "feed_forward": 96},
    ),
    "an epsilon, untied": (bert(layer_norm_eps=0.1, tie_word_embeddings=False), {"feed_forward": 80}),
    "two types, and positions from 2 on": (
        RobertaConfig(**NAMED, max_position_embeddings=34, pad_token_id=1, type_vocab_size=2),
        {"layers": 3},
    ),
    "relu": (DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=48, activation="relu"), {"width": 64}),
    "scales by layer": (
        GPT2Config(
            n_embd=32, n_layer=2, n_head=2, n_inner=48, n_positions=40, bos_token_id=0, eos_token_id=0,
            layer_norm_epsilon=0.1, activation_function="relu", scale_attn_by_inverse_layer_idx=True,
        ),
        {"layers": 4, "width": 64, "heads": 4},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(teacher, causal_teacher, tmp_path_factory):
    """A function from a configuration to a model folder of it, as others make them, every parameter drawn; beside it
    the tokenizer of a run."""

    def made(config):
        out = tmp_path_factory.mktemp("source") / config.model_type
        is_causal = config.model_type in ("llama", "gpt2")
        tokenizer = load_tokenizer(str(causal_teacher if is_causal else teacher))
        if config.vocab_size >= 30000:  # by default
            config.vocab_size = vocabulary_size(tokenizer)
        kind = AutoModelForCausalLM if is_causal else AutoModelForMaskedLM
        model = kind.from_config(config)
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                spread = 1 / parameter.shape[-1] ** 0.5 if parameter.ndim == 2 else 0.2
                parameter.mul_(parameter.ndim == 1).add_(torch.randn(parameter.shape, generator=draw) * spread)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        return out

    return made


def grown(text, source, config, sizes, init, *more):
    recipe = "standalone-clm" if config.model_type in ("llama", "gpt2") else "standalone"
    run = small_run(recipe, text, "precision=float32", "data.tokenizer=null", *more)
    tree = to_dict(run)
    tree["members"]["large"] |= {
        "model": {"family": config.model_type, **SIZES, **sizes},
        "init": {"from": str(source), **init},
    }
    return load(tree)


def logits(model, ids_BT):
    with torch.no_grad():
        return model.eval()(input_ids=ids_BT).logits


@pytest.mark.parametrize("what", SOURCES)
def test_a_start_that_is_called_exact_is_the_model_that_others_made(what, text, folder):
    config, sizes = SOURCES[what]
    source = folder(config)
    kind = AutoModelForCausalLM if config.model_type in ("llama", "gpt2") else AutoModelForMaskedLM
    original = kind.from_pretrained(source)
    run = grown(text, source, config, sizes, {"depth": "identity", "width": "replicate"})
    model = build(run, CPU).models["large"]
    assert model.config.num_hidden_layers == run.members["large"].model.layers
    assert model.config.hidden_size == run.members["large"].model.width
    known = vocabulary_size(load_tokenizer(str(source)))
    ids_BT = torch.randint(5, known, (4, 32), generator=torch.Generator().manual_seed(1))
    expected = logits(original, ids_BT)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(model, ids_BT), expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("config", "sizes", "more", "message"),
    [
        (bert(max_position_embeddings=16), {}, (), "data.length: 32 is more than the 16 positions of members.large.in"),
        (
            RobertaConfig(**NAMED, max_position_embeddings=33, pad_token_id=1),
            {},
            (),
            "data.length: 32 is more than the 31 positions",
        ),
        (llama(rope_parameters=YARN, max_position_embeddings=16), {}, (), "32 is more than the 16 positions"),
        (bert(vocab_size=20), {}, (), "knows 20 tokens, the tokenizer [0-9]+; name the tokenizer"),
        (bert(), {"family": "modernbert"}, (), "is a bert, and members.large.model.family is modernbert"),
        (
            llama(num_attention_heads=4, num_key_value_heads=2),
            {"heads": 1},
            (),
            r"members\.large\.init: heads: the source has 4 heads with 2 for keys .*set model.key_value_heads",
        ),
    ],
)
def test_a_source_that_this_run_cannot_begin_from_is_refused_in_one_line(config, sizes, more, message, text, folder):
    run = grown(text, folder(config), config, sizes, {"width": "replicate"}, *more)
    for ask in (lambda: build(run, CPU), lambda: plan(run, CPU)):
        with pytest.raises(UserError, match=message) as refusal:
            ask()
        assert "\n" not in str(refusal.value)


UNUSUAL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
OF_OTHER_HEADS = {
    "bert": BertConfig(**UNUSUAL),
    "roberta": RobertaConfig(**UNUSUAL, max_position_embeddings=64, pad_token_id=1),
    "distilbert": DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=80),
    "modernbert": modernbert(**UNUSUAL),
    "llama, grouped queries": llama(**UNUSUAL, num_key_value_heads=2),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_inner=80, n_positions=40, bos_token_id=0, eos_token_id=0),
    "gpt2 of the usual units": GPT2Config(n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0),
    "bert, whose width is no multiple of 64": BertConfig(**UNUSUAL | {"hidden_size": 200}),
}


def deeper(text, source, config, init, **sizes):
    """A run whose model names no heads and no feed-forward units, unless `sizes` do."""
    run = to_dict(grown(text, source, config, {"width": 64}, init))
    family = config.model_type
    run["members"]["large"]["model"] = {"family": family, "layers": 4, "width": config.hidden_size, **sizes}
    return load(run)


@pytest.mark.parametrize("what", OF_OTHER_HEADS)
def test_where_only_the_depth_grows_heads_and_feed_forward_units_are_the_sources(what, text, folder):
    config = OF_OTHER_HEADS[what]
    source = folder(config)
    kind = AutoModelForCausalLM if config.model_type in ("llama", "gpt2") else AutoModelForMaskedLM
    run = deeper(text, source, config, {"depth": "identity"})
    model = build(run, CPU).models["large"]
    assert (model.config.num_hidden_layers, model.config.num_attention_heads) == (4, 4)
    known = vocabulary_size(load_tokenizer(str(source)))
    ids_BT = torch.randint(5, known, (4, 32), generator=torch.Generator().manual_seed(1))
    expected = logits(kind.from_pretrained(source), ids_BT)
    torch.testing.assert_close(logits(model, ids_BT), expected, rtol=1e-4, atol=2e-4)
    counted = plan(run, CPU)
    assert counted.parameters["large"] == sum(parameter.numel() for parameter in model.parameters())


def test_sizes_that_a_member_names_or_a_width_method_makes_are_its_own(text, folder):
    config = OF_OTHER_HEADS["bert"]
    source = folder(config)
    for init, sizes, expected in (
        ({"width": "replicate"}, {"heads": 4, "feed_forward": 160}, (4, 160)),
        ({"width": "replicate"}, {"heads": 4}, (4, 128)),
        ({"learned": 1}, {"heads": 4}, (4, 128)),
    ):
        config_of = build(deeper(text, source, config, {"depth": "stack", **init}, **sizes), CPU).models["large"].config
        assert (config_of.num_attention_heads, config_of.intermediate_size) == expected
    for sizes in ({"heads": 2}, {"feed_forward": 128}):
        with pytest.raises(UserError, match="width: the shapes differ, so choose a method that widens"):
            build(deeper(text, source, config, {"depth": "stack"}, **sizes), CPU)
    with pytest.raises(
        UserError, match=r"^members\.large\.model\.key_value_heads: 4 came in; bert with 4 heads takes none"
    ):
        plan(deeper(text, source, config, {"depth": "stack"}, key_value_heads=4), CPU)


def test_longer_rows_than_the_source_was_made_for_where_positions_are_only_turned_by(text, folder):
    """A new Llama has at least 512 positions, so a run of longer rows could begin from one all along."""
    config = llama(max_position_embeddings=16)
    model = build(grown(text, folder(config), config, {}, {}), CPU).models["large"]
    assert model.config.max_position_embeddings == 32


def test_key_value_heads_are_the_members_where_it_says_how_many(text, folder):
    config = llama(num_attention_heads=4, num_key_value_heads=2)
    sizes = {"width": 64, "heads": 8}
    for given, expected in (({}, 4), ({"key_value_heads": 2}, 2), ({"key_value_heads": 8}, 8)):
        run = grown(text, folder(config), config, {**sizes, **given}, {"width": "replicate"})
        model = build(run, CPU).models["large"]
        assert model.model.layers[0].self_attn.k_proj.out_features == 8 * expected


def test_a_layer_of_no_pattern_is_of_the_kind_of_the_one_that_it_starts_from(text, folder):
    near, far = "sliding_attention", "full_attention"
    config = modernbert(layer_types=[near, far])
    source = folder(config)
    for init, expected in (
        ({"depth": "stack"}, [near, far, near, far]),
        ({"depth": [1, 1, 0, 0]}, [far, far, near, near]),
        ({"learned": 1}, [near, far, near, far]),
    ):
        model = build(grown(text, source, config, {"layers": 4}, init), CPU).models["large"]
        assert model.config.layer_types == expected


def test_the_plan_counts_what_the_source_brings_with_it(text, folder):
    config = llama(tie_word_embeddings=False, vocab_size=320)
    run = grown(text, folder(config), config, {"layers": 3}, {"depth": "stack"})
    expected = sum(parameter.numel() for parameter in build(run, CPU).models["large"].parameters())
    assert plan(run, CPU).parameters["large"] == expected


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "modernbert", "llama", "gpt2"])
def test_a_source_that_codistill_made_leaves_its_member_as_if_it_had_none(family, text, tmp_path):
    """But for its numbers: no setting of a run is lost, and runs that began so keep their results."""
    recipe = "standalone-clm" if family in ("llama", "gpt2") else "standalone"

    def model_of(sizes, *more):
        tree = to_dict(small_run(recipe, text, "precision=float32"))
        tree["members"]["large"]["model"] = {"family": family, **sizes}
        built = build(load(override(tree, more)), CPU)
        built.tokenizer.save_pretrained(tmp_path / "source")
        return built.models["large"]

    model_of({"layers": 2, "width": 32, "heads": 2}).save_pretrained(tmp_path / "source")
    sizes = {"layers": 5, "width": 64, "heads": 4, "dropout": 0.25, "feed_forward": 200}
    sizes |= {"key_value_heads": 2} if family == "llama" else {}
    from_it = f"members.large.init={{from: {tmp_path / 'source'}, depth: stack, width: replicate}}"
    with_source, alone = model_of(sizes, from_it, f"data.tokenizer={tmp_path / 'source'}"), model_of(sizes)
    assert with_source.config.to_dict() == alone.config.to_dict()
    assert not torch.equal(*(next(model.parameters()) for model in (with_source, alone)))
