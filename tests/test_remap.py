"""What the function-preserving methods promise, on real models in float64 with every parameter drawn."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codistill.errors import UserError
from codistill.remap import remap_state
from remap_models import FAMILIES, build, config_of, distance, drawn, one_thread, tokens  # noqa: F401

ROTARY = ("modernbert", "llama")
POST_NORM = ("bert", "roberta", "distilbert")
EPSILON = {"bert": {"layer_norm_eps": 1e-15}, "roberta": {"layer_norm_eps": 1e-15}}
OFTEN = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def moved(config, target, seed=0, initial_norms=False, **methods):
    model = drawn(config, seed, initial_norms)
    return model, build(target, remap_state(model.state_dict(), config, target, **methods))


@st.composite
def widenings(draw, family, method):
    """A source and a target that the method can take the one to the other exactly."""
    heads, head_width = draw(st.integers(1, 3)), draw(st.sampled_from([4, 6]))
    times = draw(st.integers(1, 3))
    exact_at_any_width = (method == "zero" and family in ("gpt2", "llama")) or (
        method == "replicate" and family == "llama"
    )
    if method == "tile" or not exact_at_any_width:
        inside = draw(st.sampled_from([k for k in (1, 2, 3) if times % k == 0]))
        new_heads, new_head_width = heads * times // inside, head_width * inside
    else:
        inside = draw(st.integers(1, 2)) if family in ROTARY else 1
        new_heads, new_head_width = heads + draw(st.integers(0, 3)), head_width * inside
    ffn = draw(st.integers(3, 8))
    new_ffn = ffn * draw(st.integers(1, 3)) if method == "tile" else ffn + draw(st.integers(0, 9))
    layers = draw(st.integers(1, 3))
    sizes = EPSILON.get(family, {}) | {"layers": layers, "width": heads * head_width, "heads": heads, "ffn": ffn}
    new_layers = layers + draw(st.integers(0, 2))
    new = EPSILON.get(family, {}) | {
        "layers": new_layers,
        "width": new_heads * new_head_width,
        "heads": new_heads,
        "ffn": new_ffn,
    }
    return config_of(family, **sizes), config_of(family, **new)


@pytest.mark.parametrize("method", ["replicate", "tile", "zero"])
@pytest.mark.parametrize("family", FAMILIES)
def test_growing_keeps_the_function(family, method):
    """Wider by whole multiples (GPT-2 and Llama also between), FFN and depth by anything, at once."""

    @OFTEN
    @given(pair=widenings(family, method), seed=st.integers(0, 99))
    def check(pair, seed):
        initial = method == "zero" and family in (*POST_NORM, "modernbert")  # exact with gains of 1 only: see below
        model, new = moved(*pair, seed=seed, initial_norms=initial, width=method, depth="identity")
        # A post-norm identity layer norms what is normed already and so counts ε once more: DistilBERT's is 1e-12.
        assert distance(model, new) < (1e-10 if family == "distilbert" else 1e-12)

    check()


@pytest.mark.parametrize("method", ["replicate", "tile", "zero"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_growing_in_float32_with_the_output_embedding_tied_or_not(family, tied, method):
    more = {"tie_word_embeddings": tied}
    initial = method == "zero" and family in (*POST_NORM, "modernbert")
    config, target = config_of(family, **more), config_of(family, 4, 16, 4, 24, **more)
    model = drawn(config, initial_norms=initial).float()
    new = build(target, remap_state(model.state_dict(), config, target, width=method, depth="identity"), torch.float32)
    expected, got = model(input_ids=tokens()).logits, new(input_ids=tokens()).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["replicate", "tile", "zero"])
@pytest.mark.parametrize("family", FAMILIES)
def test_feed_forward_units_shrink_back_while_the_rest_stays_or_grows(family, method):
    initial = method == "zero" and family in (*POST_NORM, "modernbert")
    config, middle = config_of(family), config_of(family, ffn=24)
    model, grown = moved(config, middle, initial_norms=initial, width=method)
    for sizes in ({}, {"width": 16, "heads": 4}):
        target = config_of(family, **sizes)
        new = build(target, remap_state(grown.state_dict(), middle, target, width=method))
        assert distance(model, new) < 1e-10


@pytest.mark.parametrize("method", ["replicate", "tile", "zero"])
@pytest.mark.parametrize("heads", [2, 4])
def test_a_gpt2_whose_attention_does_not_divide_keeps_its_function(heads, method):
    config, target = (
        config_of("gpt2", width=width, heads=n, scale_attn_weights=False) for width, n in ((8, 2), (16, heads))
    )
    model, new = moved(config, target, width=method)
    assert distance(model, new) < 1e-12


def test_a_target_that_alone_does_not_divide_is_refused():
    config, target = config_of("gpt2"), config_of("gpt2", width=16, scale_attn_weights=False)
    with pytest.raises(UserError, match="only one has scale_attn_weights; give the target the source's"):
        moved(config, target, width="replicate")


@pytest.mark.parametrize("method", ["replicate", "zero"])
@pytest.mark.parametrize("sizes", [(4, 4), (6, 2), (6, 6), (9, 3), (8, 2)])
def test_grouped_queries_keep_the_function(sizes, method):
    """Query and key-value heads grow each on their own; 2 of 4 queries each become any others that hold them."""
    heads, kv_heads = sizes
    config = config_of("llama", width=8, heads=4, num_key_value_heads=2, head_dim=4)
    target = config_of("llama", width=4 * heads, heads=heads, head_dim=8)
    target.num_key_value_heads = kv_heads
    model, new = moved(config, target, width=method)
    assert distance(model, new) < 1e-12


@pytest.mark.parametrize("family", ["modernbert", "llama"])
def test_biases_that_a_family_can_have(family):
    switches = {
        "llama": ["attention_bias", "mlp_bias"],
        "modernbert": ["attention_bias", "mlp_bias", "norm_bias", "classifier_bias"],
    }
    more = dict.fromkeys(switches[family], True)
    config, target = config_of(family, **more), config_of(family, 3, 16, 4, 20, **more)
    model, new = moved(config, target, width="replicate", depth="identity")
    assert distance(model, new) < 1e-12


def test_rotary_heads_match_places_by_frequency():
    """θ' = θ² lets a head twice as wide start with the old frequencies, in order."""
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    config = config_of("llama", width=8, heads=2, rope_parameters=rope)
    target = config_of("llama", width=16, heads=2, rope_parameters=rope | {"rope_theta": 1e8})
    model, new = moved(config, target, width="tile")
    assert distance(model, new) < 1e-12
    old, wide = (m.state_dict()["model.layers.0.self_attn.q_proj.weight"] for m in (model, new))
    assert (wide[:2].norm(), wide[2:4].norm()) == (pytest.approx(old[[0, 1]].norm()), 0)


@pytest.mark.parametrize("method", ["zero", "replicate", "advanced", "select"])
def test_distance_where_a_norm_makes_exactness_impossible(method):
    """Measured, so that a change shows: standard deviations of the logits, the largest of all logits."""
    target = config_of("bert", 2, 4, 1, 6) if method == "select" else config_of("bert", 2, 12, 3, 20)
    model, new = moved(config_of("bert"), target, width=method)
    assert 1e-2 < distance(model, new) < 10


@pytest.mark.parametrize("family", POST_NORM)
def test_a_naive_identity_layer_fails_with_trained_norms(family):
    """Copies of the last layer that add nothing are no identity after a norm: why its gain and bias have to move."""
    config, target = config_of(family), config_of(family, 3)
    model = drawn(config)
    state = dict(build(target, remap_state(model.state_dict(), config, target, depth="repeat-last")).state_dict())
    for name in state:
        if ".layer.2." in name and any(part in name for part in ("output.dense", "out_lin", "lin2")):
            state[name] = torch.zeros_like(state[name])
    assert distance(model, build(target, state)) > 0.1


def test_a_post_norm_identity_layer_counts_epsilon_again():
    """Its error is that of ε, and nothing else: 100 times smaller with it."""
    far = []
    for epsilon in (1e-5, 1e-7):
        config, target = (config_of("roberta", layers, 16, layer_norm_eps=epsilon) for layers in (2, 4))
        far.append(distance(*moved(config, target, depth="identity")))
    assert 1e-6 < far[0] < 1e-4
    assert 90 < far[0] / far[1] < 110


WIDEN_PAIRS = [("replicate", 1e-12), ("tile", 0.0), ("zero", 1e-12)]


@pytest.mark.parametrize(("method", "tolerance"), WIDEN_PAIRS)
@pytest.mark.parametrize("family", FAMILIES)
def test_widen_then_narrow(family, method, tolerance):
    """Bit by bit for 2 or 4 copies of everything; to rounding where something is divided by 3 or √2."""
    config = config_of(family, width=8, heads=2, ffn=12)
    for target in [config_of(family, width=32, heads=8, ffn=48), config_of(family, width=24, heads=6, ffn=36)]:
        state = drawn(config).state_dict()
        wide = remap_state(state, config, target, width=method)
        back = remap_state(wide, target, config, width=method)
        power_of_two = target.hidden_size == 32
        for name in state:
            bound = 0.0 if power_of_two else 1e-14
            torch.testing.assert_close(back[name], state[name], rtol=bound, atol=bound, msg=name)


@pytest.mark.parametrize(
    ("deepen", "drop"),
    [
        ("repeat-last", "first"),
        ("stack", "first"),
        ("stack", [0, 1, 2]),
        ("interpolate", "uniform"),
        ("interpolate", [0, 2, 4]),
        ("identity", "identity"),
        ([0, 1, 2, 0, 1, 2], "last"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_deepen_then_drop(family, deepen, drop):
    if family == "modernbert" and drop == "last":
        pytest.skip("layer 0 has no first norm, and comes back from a layer that has one")
    config, target = config_of(family, 3), config_of(family, 6)
    state = drawn(config).state_dict()
    back = remap_state(remap_state(state, config, target, depth=deepen), target, config, depth=drop)
    for name in state:
        assert torch.equal(back[name], state[name]), name


def test_interpolated_layers_that_lack_a_norm_come_back():
    """ModernBERT's layer 0 reads without a norm; its copy elsewhere has one with gain 1."""
    config, target = config_of("modernbert"), config_of("modernbert", 4)
    state = remap_state(drawn(config).state_dict(), config, target, depth="interpolate")
    assert (state["model.layers.1.attn_norm.weight"] == 1).all()
    assert torch.equal(state["model.layers.1.attn.Wqkv.weight"], state["model.layers.0.attn.Wqkv.weight"])


def test_a_layer_that_becomes_the_first_takes_its_norm_along():
    config, target = config_of("modernbert", 3), config_of("modernbert", 2)
    state = drawn(config).state_dict()
    new = remap_state(state, config, target, depth="last")
    expected = state["model.layers.1.attn.Wqkv.weight"] @ torch.diag(state["model.layers.1.attn_norm.weight"])
    torch.testing.assert_close(new["model.layers.0.attn.Wqkv.weight"], expected)


@pytest.mark.parametrize("method", ["replicate", "zero"])
@pytest.mark.parametrize("family", FAMILIES)
def test_everything_new_can_learn(family, method):
    """After three steps every parameter has moved, except those that never do."""
    config, target = config_of(family), config_of(family, 3, 16, 4, 24)
    _, new = moved(config, target, width=method, depth="identity")
    before = {name: parameter.detach().clone() for name, parameter in new.named_parameters()}
    optimizer = torch.optim.SGD(new.parameters(), lr=0.1)
    ids = tokens(batch=8)
    for _ in range(3):
        optimizer.zero_grad()
        new(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    for name, parameter in new.named_parameters():
        rows = (parameter == before[name]).nonzero()
        if "key.bias" in name or "k_lin.bias" in name or "c_attn.bias" in name:
            continue  # a key's bias adds the same to every score: the softmax does not see it
        if "embed" in name or "wpe" in name or "wte" in name:
            rows = rows[(rows[:, 0] > 0) & (rows[:, 0] < 2)] if rows.ndim == 2 and rows.shape[1] == 2 else rows
            rows = rows if "token_type" not in name else rows[:0]
        assert len(rows) == 0, (name, rows)


def test_copies_stay_copies_unless_the_split_is_uneven():
    """Why `noise` exists: with equal shares, two copies have equal gradients for ever."""
    config, target = config_of("llama"), config_of("llama", ffn=24)
    spread = []
    for noise in (0.0, 0.1):
        model, new = moved(config, target, width="tile", noise=noise)
        assert distance(model, new) < 1e-12
        optimizer = torch.optim.Adam(new.parameters(), lr=0.01)
        for _ in range(5):
            optimizer.zero_grad()
            new(input_ids=tokens(), labels=tokens()).loss.backward()
            optimizer.step()
        first, second = new.state_dict()["model.layers.0.mlp.up_proj.weight"].split(12)
        spread.append((first - second).abs().max().item())
    assert spread[0] < 1e-9
    assert spread[1] > 1e-3


def test_nothing_is_shared_with_the_source():
    config = config_of("gpt2")
    state = drawn(config).state_dict()
    new = remap_state(state, config, config_of("gpt2", 4), depth="stack")
    owners = [tensor.data_ptr() for name, tensor in new.items() if name != "lm_head.weight"]
    assert len(set(owners)) == len(owners)
    assert not set(owners) & {tensor.data_ptr() for tensor in state.values()}
    assert new["lm_head.weight"] is new["transformer.wte.weight"]
