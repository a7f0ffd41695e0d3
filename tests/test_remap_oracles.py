"""Each method against its paper's equation, written out with explicit matrices and loops."""

import math

import numpy as np
import pytest
import torch

from codistill.errors import UserError
from codistill.remap import remap_state
from codistill.remap.depth import layer_map
from remap_models import config_of, drawn, one_thread  # noqa: F401

# A BERT layer by hand: matrix, what it writes, what it reads.
MATRICES = [
    ("attention.self.query", "attention", "stream"),
    ("attention.self.key", "attention", "stream"),
    ("attention.self.value", "attention", "stream"),
    ("attention.output.dense", "stream", "attention"),
    ("intermediate.dense", "ffn", "stream"),
    ("output.dense", "stream", "ffn"),
]
NORMS = ["attention.output.LayerNorm", "output.LayerNorm"]
LAYER = "bert.encoder.layer.{}.{}"
WORDS = "bert.embeddings.word_embeddings.weight"


def bert(layers=2, width=8, heads=2, ffn=6):
    config = config_of("bert", layers, width, heads, ffn)
    return config, {name: tensor.numpy() for name, tensor in drawn(config).state_dict().items()}


def remapped(state, config, target, **methods):
    state = {name: torch.from_numpy(tensor) for name, tensor in state.items()}
    return {name: tensor.numpy() for name, tensor in remap_state(state, config, target, **methods).items()}


def copy_matrix(units, narrow):
    """E with E[j, units[j]] = 1."""
    matrix = np.zeros((len(units), narrow))
    for j, i in enumerate(units):
        matrix[j, i] = 1
    return matrix


def find_units(new, old):
    """For each row of `new` the row of `old` that it copies."""
    return [int(np.flatnonzero([np.array_equal(row, other) for other in old])[0]) for row in new]


def test_layers_by_hand():
    assert layer_map("repeat-last", 4, 6) == [0, 1, 2, 3, 3, 3]  # DWT: 1–4 ← 1–4, 5 and 6 ← 4
    assert layer_map("stack", 3, 6) == [0, 1, 2, 0, 1, 2]
    assert layer_map("stack", 3, 7) == [0, 1, 2, 0, 1, 2, 0]
    assert layer_map("interpolate", 3, 6) == [0, 0, 1, 1, 2, 2]
    assert layer_map("interpolate", 2, 6) == [0, 0, 0, 1, 1, 1]
    assert layer_map("uniform", 12, 6) == [0, 2, 4, 7, 9, 11]  # DistilBERT
    assert layer_map("uniform", 12, 1) == [0]
    assert layer_map("first", 12, 3) == [0, 1, 2]
    assert layer_map("last", 12, 3) == [9, 10, 11]
    assert layer_map("identity", 2, 4) == [0, 1, 1, 1]
    assert layer_map([1, 0, 1], 2, 3) == [1, 0, 1]
    assert layer_map(None, 3, 3) == [0, 1, 2]


@pytest.mark.parametrize(
    ("depth", "source"),
    [("repeat-last", [0, 1, 2, 3, 3, 3]), ("stack", [0, 1, 2, 3, 0, 1]), ([3, 3, 2, 2, 1, 0], [3, 3, 2, 2, 1, 0])],
)
def test_layers_in_a_state(depth, source):
    config, state = bert(layers=4)
    new = remapped(state, config, config_of("bert", 6, 8, 2, 6), depth=depth)
    for i, j in enumerate(source):
        for name, *_ in [*MATRICES, *[(norm,) for norm in NORMS]]:
            for part in ("weight", "bias"):
                assert np.array_equal(new[LAYER.format(i, f"{name}.{part}")], state[LAYER.format(j, f"{name}.{part}")])
    for name in state:
        if ".layer." not in name:
            assert np.array_equal(new[name], state[name])


def test_tile_is_hypercloning():
    """Matrices are n × n blocks of W ÷ n, what a table or a bias or a norm writes is n copies."""
    config, state = bert()
    new = remapped(state, config, config_of("bert", 2, 24, 6, 18), width="tile")
    for layer in (0, 1):
        for name, *_ in MATRICES:
            name = LAYER.format(layer, name)
            blocks = np.kron(np.ones((3, 3)), state[f"{name}.weight"]) / 3
            np.testing.assert_allclose(new[f"{name}.weight"], blocks, rtol=1e-15)
            assert np.array_equal(new[f"{name}.bias"], np.tile(state[f"{name}.bias"], 3))
        for norm in NORMS:
            for part in ("weight", "bias"):
                name = LAYER.format(layer, f"{norm}.{part}")
                assert np.array_equal(new[name], np.tile(state[name], 3))
    assert np.array_equal(new[WORDS], np.tile(state[WORDS], (1, 3)))
    # The tied head sums over three copies of every unit, so the norm before it hands over a third.
    for part in ("weight", "bias"):
        name = f"cls.predictions.transform.LayerNorm.{part}"
        np.testing.assert_allclose(new[name], np.tile(state[name], 3) / 3, rtol=1e-15)


def test_replicate_is_net2net():
    """W' = E_out W D⁻¹ E_inᵀ with one index map per space, read off the result; whole heads."""
    config, state = bert()
    new = remapped(state, config, config_of("bert", 2, 16, 4, 9), width="replicate", seed=3)
    expand = {"stream": copy_matrix(find_units(new[WORDS].T, state[WORDS].T), 8)}
    for layer in (0, 1):
        key = LAYER.format(layer, "attention.self.value.bias")
        heads = find_units(new[key].reshape(4, 4), state[key].reshape(2, 4))
        expand["attention"] = copy_matrix([4 * head + i for head in heads for i in range(4)], 8)
        key = LAYER.format(layer, "intermediate.dense.bias")
        expand["ffn"] = copy_matrix(find_units(new[key][:, None], state[key][:, None]), 6)
        assert [matrix[: len(matrix[0])].tolist() for matrix in expand.values()] == [
            np.eye(len(matrix[0])).tolist() for matrix in expand.values()
        ]
        for name, out, read in MATRICES:
            name = LAYER.format(layer, name)
            counts = expand[read].sum(0)
            weight = expand[out] @ state[f"{name}.weight"] @ np.diag(1 / counts) @ expand[read].T
            np.testing.assert_allclose(new[f"{name}.weight"], weight, rtol=1e-15)
            assert np.array_equal(new[f"{name}.bias"], expand[out] @ state[f"{name}.bias"])
        for norm in NORMS:
            name = LAYER.format(layer, f"{norm}.weight")
            assert np.array_equal(new[name], expand["stream"] @ state[name])


def test_replicate_draws_by_seed():
    config, state = bert()
    target = config_of("bert", 2, 8, 2, 12)
    first, again, other = (remapped(state, config, target, width="replicate", seed=seed) for seed in (0, 0, 1))
    name = LAYER.format(0, "intermediate.dense.weight")
    assert np.array_equal(first[name], again[name])
    assert not np.array_equal(first[name], other[name])


def test_gpt2_is_the_same_transposed_and_packed():
    config = config_of("gpt2")
    state = {name: tensor.numpy() for name, tensor in drawn(config).state_dict().items()}
    new = remapped(state, config, config_of("gpt2", 2, 16, 4, 24), width="tile")
    packed = state["transformer.h.1.attn.c_attn.weight"]  # (in, query + key + value)
    blocks = [np.tile(part, (2, 2)) / 2 for part in np.split(packed, 3, axis=1)]
    assert np.array_equal(new["transformer.h.1.attn.c_attn.weight"], np.concatenate(blocks, axis=1))
    name = "transformer.h.1.mlp.c_proj.weight"
    assert np.array_equal(new[name], np.tile(state[name], (2, 2)) / 2)


def test_advanced_takes_the_added_units_from_the_next_layer():
    """bert2BERT AKI: U = W R_in for a layer and for the next; the added rows are the next one's rows U[units]."""
    config, state = bert(layers=3)
    new = remapped(state, config, config_of("bert", 3, 16, 4, 9), width="advanced")
    stream = find_units(new[WORDS].T, state[WORDS].T)
    name = "intermediate.dense.bias"
    last = LAYER.format(2, name)
    units = {"ffn": find_units(new[last][:, None], state[last][:, None]), "stream": stream}
    last = LAYER.format(2, "attention.self.value.bias")
    heads = find_units(new[last].reshape(4, 4), state[last].reshape(2, 4))
    units["attention"] = [4 * head + i for head in heads for i in range(4)]

    def expanded(layer, name, read, row):
        old = state[LAYER.format(layer, f"{name}.weight")]
        return [old[row, i] / units[read].count(i) for i in units[read]]

    for layer in range(3):
        following = min(layer + 1, 2)
        for name, out, read in MATRICES:
            weight, bias = (new[LAYER.format(layer, f"{name}.{part}")] for part in ("weight", "bias"))
            old = len(state[LAYER.format(layer, f"{name}.bias")])
            for j, i in enumerate(units[out]):
                origin = layer if j < old else following
                np.testing.assert_allclose(weight[j], expanded(origin, name, read, i), rtol=1e-14)
                assert bias[j] == state[LAYER.format(origin, f"{name}.bias")][i]


@pytest.mark.parametrize(("depth", "layers"), [("first", (0, 1)), ([2, 0], (2, 0)), ("repeat-last", (0, 1, 2, 2))])
def test_advanced_takes_the_sources_next_layer_whatever_the_target_keeps(depth, layers):
    config, state = bert(layers=3)
    all_three = remapped(state, config, config_of("bert", 3, 16, 4, 9), width="advanced")
    new = remapped(state, config, config_of("bert", len(layers), 16, 4, 9), width="advanced", depth=depth)
    for name in new:
        _, inside, part = name.partition("bert.encoder.layer.")
        at, _, rest = part.partition(".")
        source = LAYER.format(layers[int(at)], rest) if inside else name
        np.testing.assert_array_equal(new[name], all_three[source])


def test_zero_is_silent_and_can_be_woken():
    """8 → 12 units, FFN 12 → 15, √(12/8) = s: E = s [I; 0] for the stream; what reads the added units is a copy."""
    config, target = config_of("llama", 1, 8, 2), config_of("llama", 1, 12, 3, 15)
    old = drawn(config).state_dict()
    new = remap_state(old, config, target, width="zero")
    silent = lambda matrix, rows: torch.cat([matrix, torch.zeros(rows, matrix.shape[1])])  # noqa: E731
    wrap = lambda matrix, n: matrix[torch.arange(n) % len(matrix)]  # noqa: E731
    s = 1.5**0.5
    layer = "model.layers.0."
    expected = {
        "model.embed_tokens.weight": s * silent(old["model.embed_tokens.weight"].T, 4).T,
        layer + "input_layernorm.weight": wrap(old[layer + "input_layernorm.weight"], 12) / s,
        layer + "mlp.up_proj.weight": wrap(wrap(old[layer + "mlp.up_proj.weight"].T, 12).T, 15),
        layer + "mlp.down_proj.weight": s * silent(silent(old[layer + "mlp.down_proj.weight"], 4).T, 3).T,
        layer + "self_attn.v_proj.weight": wrap(wrap(old[layer + "self_attn.v_proj.weight"].T, 12).T, 12),
        "model.norm.weight": wrap(old["model.norm.weight"], 12) / s,
        "lm_head.weight": wrap(old["lm_head.weight"].T, 12).T,
    }
    for name, tensor in expected.items():
        torch.testing.assert_close(new[name], tensor.double(), msg=name)
    # Narrowing a model that was never widened keeps its first units, and undoes only the scale.
    wide = drawn(target).state_dict()
    narrow = remap_state(wide, target, config, width="zero")
    torch.testing.assert_close(narrow[layer + "mlp.up_proj.weight"], wide[layer + "mlp.up_proj.weight"][:12, :8])
    torch.testing.assert_close(
        narrow[layer + "mlp.down_proj.weight"], wide[layer + "mlp.down_proj.weight"][:8, :12] / s
    )


def chosen(source, target):
    """Weight selection's indices of one dimension."""
    if source % target == 0:
        return np.arange(target) * (source // target)
    return np.round(np.linspace(0, source - 1, target)).astype(int)


def test_select_is_weight_selection():
    """Half of each head's units are half of all units evenly spaced, so heads make no difference to the paper's."""
    config, state = bert(width=16, heads=4, ffn=11)
    new = remapped(state, config, config_of("bert", 2, 8, 4, 5), width="select")
    sizes = {16: 8, 11: 5}
    for name, tensor in state.items():
        kept = np.ix_(*(chosen(n, sizes.get(n, n)) for n in tensor.shape))
        assert np.array_equal(new[name], tensor[kept]), name


def test_select_keeps_the_rotary_places_that_turn_as_fast():
    """Of heads of 8 units those of 4: unit i turns by θ^(−2i/8), which is unit i / 2 of the narrow one."""
    config, target = config_of("llama", 1, 16, 2, 6), config_of("llama", 1, 8, 2, 6)
    old = {name: tensor.numpy() for name, tensor in drawn(config).state_dict().items()}
    new = remapped(old, config, target, width="select")
    stream = [0, 2, 4, 6, 8, 10, 12, 14]
    turning = [8 * head + unit for head in (0, 1) for unit in (0, 2, 4, 6)]
    for name in ("q_proj", "k_proj"):
        name = f"model.layers.0.self_attn.{name}.weight"
        np.testing.assert_array_equal(new[name], old[name][np.ix_(turning, stream)])


def test_select_first():
    config, state = bert(width=16, heads=4, ffn=11)
    new = remapped(state, config, config_of("bert", 2, 8, 2, 5), width="select-first")
    sizes = {16: 8, 11: 5}
    for name, tensor in state.items():
        kept = np.ix_(*(np.arange(sizes.get(n, n)) for n in tensor.shape))
        assert np.array_equal(new[name], tensor[kept]), name


def test_fewer_key_value_heads_are_their_groups_means():
    config = config_of("llama", width=16, heads=4)
    state = drawn(config).state_dict()
    target = config_of("llama", width=16, heads=4, num_key_value_heads=2)
    new = remap_state(state, config, target, width="tile")
    name = "model.layers.0.self_attn.k_proj.weight"
    old, got = state[name].view(4, 4, 16), new[name].view(2, 4, 16)
    torch.testing.assert_close(got, (old[:2] + old[2:]) / 2)
    # The queries move beside them: heads 0 and 2 share the first, 1 and 3 the second.
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(new[name].view(4, 4, 16), state[name].view(4, 4, 16)[[0, 2, 1, 3]])


BERT = ("bert", 2, 8, 2, 12)
BAD = [
    (BERT, ("bert", 2, 16, 4, 12), {}, r"choose a method.*2 layers × 8.*2 layers × 16"),
    (BERT, ("bert", 3, 8, 2, 12), {}, r"2 layers and the target 3; choose repeat-last, stack"),
    (BERT, ("bert", 3, 8, 2, 12), {"depth": "first"}, r"'first' cannot take 2 layers to 3; choose repeat-last"),
    (BERT, ("bert", 1, 8, 2, 12), {"depth": "stack"}, r"'stack' cannot take 2 layers to 1; choose first"),
    (BERT, ("bert", 1, 8, 2, 12), {"depth": "stach"}, r"'stach' is no method; choose repeat-last"),
    (BERT, ("bert", 2, 8, 2, 12), {"depth": [1, 1]}, r"names layer 1 twice"),
    (BERT, ("bert", 2, 8, 2, 12), {"depth": [0, 2]}, r"0 to 1, and no layer 2"),
    (BERT, ("bert", 2, 8, 2, 12), {"depth": [0]}, r"names 1 layers and the target has 2"),
    (BERT, ("bert", 2, 12, 3, 12), {"width": "tile"}, r"whole multiples, and width goes from 8 to 12.*replicate"),
    (BERT, ("bert", 2, 16, 4, 12), {"width": "select"}, r"cannot take width from 8 to 16; choose replicate.*× 8.*× 16"),
    (BERT, ("bert", 2, 4, 1, 12), {"width": "advanced"}, r"cannot take width from 8 to 4; choose select.*× 8.*× 4"),
    (BERT, ("bert", 2, 16, 4, 12), {"width": "wide"}, r"'wide' is no method; choose replicate"),
    (BERT, ("bert", 2, 16, 1, 12), {"width": "tile"}, r"must all grow or all shrink.*2 heads of 4.*1 heads of 16"),
    (BERT, ("bert", 2, 16, 4, 12), {"width": "zero", "noise": 0.1}, r"noise goes with width replicate or tile"),
    (
        BERT,
        ("bert", 2, 16, 4, 12),
        {"width": "tile", "noise": -1.0},
        r"noise: -1.0; wanted a finite number of at least",
    ),
    (BERT, ("bert", 2, 16, 4, 12), {"width": "tile", "noise": math.nan}, r"noise: nan; wanted a finite number"),
    (BERT, ("roberta", 2, 8, 2, 12), {}, r"a bert cannot become a roberta"),
    (("llama", 2, 8, 2, 12), ("llama", 2, 12, 2, 12), {"width": "zero"}, r"heads of 4 and of 6 units.*whole multiple"),
]


@pytest.mark.parametrize(("before", "after", "methods", "message"), BAD)
def test_shapes_that_cannot_map(before, after, methods, message):
    config = config_of(*before)
    with pytest.raises(UserError, match=message):
        remap_state(drawn(config).state_dict(), config, config_of(*after), **methods)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 14}, r"vocabulary is 13 in the source and 14 in the target: set .* to 13"),
        ({"max_position_embeddings": 21}, r"20 positions and the target 21"),
        ({"hidden_act": "relu"}, r"hidden_act is 'gelu' in the source and 'relu' in the target"),
        ({"num_attention_heads": 3}, r"3 heads .* do not divide width 8"),
        ({"num_attention_heads": 0}, r"num_attention_heads is 0; wanted at least 1"),
        ({"num_hidden_layers": -1}, r"num_hidden_layers is -1; wanted at least 1"),
    ],
)
def test_configurations_that_do_not_agree(change, message):
    config, target = config_of(*BERT), config_of(*BERT)
    for name, value in change.items():
        setattr(target, name, value)
    with pytest.raises(UserError, match=message):
        remap_state(drawn(config).state_dict(), config, target)


def test_a_tied_head_needs_a_tied_source():
    config, target = config_of("llama"), config_of("llama", tie_word_embeddings=True)
    with pytest.raises(UserError, match="set tie_word_embeddings to false in the target"):
        remap_state(drawn(config).state_dict(), config, target)


def test_grouped_queries_without_room():
    config = config_of("llama", width=16, heads=4, num_key_value_heads=2)
    target = config_of("llama", width=16, heads=4, num_key_value_heads=4, head_dim=4)
    model = remap_state(drawn(config).state_dict(), config, target, width="tile")
    assert model["model.layers.0.self_attn.k_proj.weight"].shape == (16, 16)
    target = config_of("llama", width=24, heads=6, num_key_value_heads=6, head_dim=4)
    target.num_key_value_heads, target.num_attention_heads = 3, 6
    source = config_of("llama", width=24, heads=6, num_key_value_heads=2, head_dim=4)
    with pytest.raises(UserError, match=r"leave no room .* choose a whole multiple of 2 key-value heads"):
        remap_state(drawn(source).state_dict(), source, target, width="replicate")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda s: s.pop("bert.encoder.layer.1.output.dense.bias"),
            r"no tensor bert.encoder.layer.1.output.dense.bias",
        ),
        (
            lambda s: s.update({"bert.encoder.layer.7.output.dense.bias": torch.zeros(8)}),
            r"has 1 tensors that 2 layers",
        ),
        (lambda s: s.update({WORDS: torch.zeros(5, 8)}), r"is \(5, 8\), .* it should be \(13, 8\)"),
    ],
)
def test_states_that_are_not_what_the_configuration_says(edit, message):
    config = config_of(*BERT)
    state = dict(drawn(config).state_dict())
    edit(state)
    with pytest.raises(UserError, match=message):
        remap_state(state, config, config)
