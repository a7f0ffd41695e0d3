"""LiGO against Kronecker products, and that a hundred steps of it lower a loss."""

import numpy as np
import pytest
import torch

from codistill.errors import UserError
from codistill.remap import learn_growth, remap_state
from codistill.remap.learned import Growth
from remap_models import FAMILIES, build, config_of, distance, drawn, one_thread, tokens  # noqa: F401

LAYER = "bert.encoder.layer.{}.{}"


def growth_of(family, target, seed=0):
    config = config_of(family)
    model = drawn(config)
    return model, Growth.between(model.state_dict(), config, target, seed)


def test_against_kronecker_products():
    """vec(W') = (w ⊗ I) diag(B_j ⊗ A_j) vec(W) with drawn maps and mixtures, vec row by row."""
    target = config_of("bert", 3, 16, 4, 18)
    model, growth = growth_of("bert", target)
    generator = torch.Generator().manual_seed(5)
    parameters = growth.start("stack")
    drawn_ = {n: torch.randn(t.shape, generator=generator, dtype=torch.float64) for n, t in parameters.items()}
    new, old = growth.state(drawn_), model.state_dict()
    maps = {name: tensor.numpy() for name, tensor in drawn_.items()}
    copies = maps_copies(parameters)
    for name, out, read in [
        ("intermediate.dense.weight", "{}.ffn", "stream"),
        ("output.dense.weight", "stream", "{}.ffn"),
        ("attention.output.dense.weight", "stream", "{}.value"),
        ("attention.self.key.weight", "{}.key", "stream"),
    ]:
        widen = [
            np.kron(
                maps[f"width.{out.format(j)}"],
                np.diag(1 / copies[f"width.{read.format(j)}"]) @ maps[f"width.{read.format(j)}"],
            )
            for j in (0, 1)
        ]
        stacked = np.concatenate([widen[j] @ old[LAYER.format(j, name)].numpy().ravel() for j in (0, 1)])
        expected = np.kron(maps[f"depth.{name}"], np.eye(len(stacked) // 2)) @ stacked
        got = np.concatenate([new[LAYER.format(i, name)].numpy().ravel() for i in range(3)])
        np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-11)
    words = "bert.embeddings.word_embeddings.weight"
    np.testing.assert_allclose(new[words].numpy(), old[words].numpy() @ maps["width.stream"].T)


def maps_copies(parameters):
    """How often each narrow unit starts, per wide unit."""
    found = {}
    for name, tensor in parameters.items():
        units = tensor.argmax(1)
        found[name] = np.array([(units == unit).sum().item() for unit in units])
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_it_starts_at_replicate_and_the_depth_way(family):
    config, target = config_of(family), config_of(family, 3, 16, 4, 18)
    model, growth = growth_of(family, target, seed=2)
    start = growth.state(growth.start("interpolate"))
    expected = remap_state(model.state_dict(), config, target, depth="interpolate", width="replicate", seed=2)
    assert set(start) == set(expected)
    for name, tensor in start.items():
        torch.testing.assert_close(tensor, expected[name], msg=name)
    wide = config_of(family, 2, 16, 4, 18)
    model, growth = growth_of(family, wide)
    assert distance(model, build(wide, growth.state(growth.start("stack")))) < 1e-12


@pytest.mark.parametrize("family", ["bert", "modernbert", "llama"])
def test_learning_lowers_the_loss(family):
    config, target = config_of(family), config_of(family, 3, 16, 4, 18)
    model, new = drawn(config).float(), build(target, dtype=torch.float32)
    ids = tokens()

    def loss_of(state):
        losses.append(torch.func.functional_call(new, state, kwargs={"input_ids": ids, "labels": ids}).loss)
        return losses[-1]

    losses = []
    grown = learn_growth(model.state_dict(), config, target, loss_of, steps=60)
    new.load_state_dict(grown)
    assert losses[-1] < 0.8 * losses[0]
    assert not any(tensor.requires_grad for tensor in grown.values())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, drawn(config).float().state_dict()[name])


def test_no_growth_learns_nothing():
    config = config_of("gpt2")
    state = drawn(config).state_dict()
    grown = learn_growth(state, config, config, lambda _: pytest.fail("no loss is needed"))
    assert all(torch.equal(grown[name], state[name]) for name in state)


def test_what_cannot_be_learned():
    config = config_of("bert")
    state = drawn(config).state_dict()
    with pytest.raises(UserError, match=r"cannot take width from 8 to 4"):
        learn_growth(state, config, config_of("bert", 2, 4, 1, 12), lambda _: torch.tensor(0.0))
    with pytest.raises(UserError, match=r"the loss is nan at step 0 of 100; choose a smaller lr than"):
        learn_growth(state, config, config_of("bert", 3), lambda _: torch.tensor(float("nan")))


@pytest.mark.parametrize("family", ["roberta", "modernbert"])
def test_the_loss_that_growth_learns_from_is_the_runs(family):
    """With documents apart: positions that count as the family does, masks that keep its windows, weighted rows."""
    from types import SimpleNamespace

    from codistill.config import ModelConfig
    from codistill.data.packing import document_mask, document_positions
    from codistill.initial import _loss_on
    from codistill.models import new_model
    from codistill.objectives import Batch

    config = ModelConfig(family=family, layers=4, width=32, heads=2)
    model = new_model(config, vocabulary=50, length=90, tokenizer=None, seed=0, name="a")
    ids_BT = torch.randint(5, 50, (1, 90))
    ids_BT[0, 20] = 3  # ends the first document
    known = SimpleNamespace(size=50, start=None, separator=3)
    positions = document_positions(ids_BT.numpy(), known)
    inputs = {"position_ids": positions, "attention_mask": document_mask(positions)}
    inputs = {"input_ids": ids_BT, **{name: torch.from_numpy(array) for name, array in inputs.items()}}
    rows_N, weight_N = torch.tensor([3, 30, 80]), torch.tensor([1.0, 2.0, 0.0])
    batch = Batch(inputs, rows_N, torch.tensor([7, 8, 9]), row_weight_N=weight_N)
    found = _loss_on(model, SimpleNamespace(vocabulary=known, at=lambda step: [batch]))(dict(model.named_parameters()))
    with torch.no_grad():
        apart = [model.eval()(input_ids=part).logits[0] for part in (ids_BT[:, :21], ids_BT[:, 21:])]
    log_p = torch.cat(apart).log_softmax(-1)
    torch.testing.assert_close(found, -(log_p[3, 7] + 2 * log_p[30, 8]) / 3)
