"""The vocabulary loss against torch.nn.functional and autograd in float64, and what must not change a bit of it."""

import itertools
import random

import pytest
import torch

from codistill.kernels import Edge, linear_cohort_loss
from codistill.kernels.chunked import rows_per_chunk
from cohort_cases import NAMES, edge_sets, error, gradients, make, oracle, worst_error

IMPLEMENTATIONS = ["reference", "chunked"]
BOTH_WAYS = [Edge("ann", "bob"), Edge("bob", "ann", 0.5, 2.0)]


@pytest.fixture(params=[False, True], ids=["", "poisoned"])
def poisoned(request):
    """With True, every uninitialised buffer is filled with NaN: whatever reads one before writing it will show."""
    if not request.param:
        yield
        return
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def sampled(members: int, count: int) -> list[list[Edge]]:
    sets = edge_sets(members)
    return random.Random(members).sample(sets, min(count, len(sets)))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("members", [1, 2, 3, 4])
def test_equals_autograd(impl, members, poisoned):
    for index, edges in enumerate(sampled(members, 24)):
        frozen = NAMES[: index % (members + 1)]
        assert worst_error(make(members, edges=edges, frozen=frozen, seed=index), impl=impl, chunk_rows=3) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("members", [2, 3, 4])
def test_equals_autograd_for_every_set_of_edges(members):
    for index, edges in enumerate(edge_sets(members)):
        assert worst_error(make(members, edges=edges, seed=index), impl="chunked", chunk_rows=4) < 1e-12


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon", "squared_error"])
def test_every_divergence_and_temperature(impl, divergence, temperature):
    edges = [Edge("ann", "bob", 0.7, temperature, divergence), Edge("bob", "ann", 1.3, temperature, divergence)]
    assert worst_error(make(edges=edges, spread=4.0), impl=impl) < 1e-12


SHAPES = [*itertools.product([1, 7, 252, 507], [11, 1000]), (1, 30522), (7, 30522), (252, 30522)]


@pytest.mark.parametrize("poisoned", [True], ids=["poisoned"], indirect=True)
def test_squared_error_beside_other_divergences_in_many_chunks(poisoned):
    edges = [Edge("ann", "bob", 0.7, 3.0, "squared_error"), Edge("bob", "ann", 0.5, 2.0), Edge("cyd", "bob")]
    for chunk_rows in (1, 4, 100):
        assert worst_error(make(3, rows=9, edges=edges), impl="chunked", chunk_rows=chunk_rows) < 1e-12


@pytest.mark.parametrize("poisoned", [True], ids=["poisoned"], indirect=True)
@pytest.mark.parametrize(("rows", "vocabulary"), [*SHAPES, pytest.param(507, 30522, marks=pytest.mark.slow)])
def test_odd_shapes(rows, vocabulary, poisoned):
    edges = [Edge("ann", "bob", 1.0, 2.0, "forward_kl"), Edge("bob", "ann", 0.5, 1.0, "reverse_kl")]
    case = make(rows=rows, vocabulary=vocabulary, edges=edges)
    case.row_weight[0] = 0.5
    assert worst_error(case, impl="chunked") < 1e-12


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_weights_may_be_tensors(impl):
    edges = [Edge("ann", "bob", torch.tensor(0.25)), Edge("bob", "ann", torch.tensor(3.0), 2.0, "jensen_shannon")]
    case = make(edges=edges)
    case.hard_weight = {"ann": torch.tensor(0.5), "bob": torch.tensor(2.0)}
    assert worst_error(case, impl=impl) < 1e-12


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_tensors_are_matched_by_name_in_whatever_order_they_come(impl):
    """Members of one width: their gradients would not betray a mix-up by their shapes."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight = ({n: torch.randn(r, 4, generator=draw).requires_grad_() for n in "ab"} for r in (6, 10))
    labels = torch.randint(10, (6,), generator=draw)
    last_first = {name: weight[name] for name in "ba"}
    loss = linear_cohort_loss(hidden, last_first, {}, labels, hard_weight={"b": 1.0, "a": 2.0}, edges=[], impl=impl)
    found = torch.autograd.grad(loss.total, [weight["a"], weight["b"], hidden["a"]])
    hard = {n: torch.nn.functional.cross_entropy(hidden[n] @ weight[n].T, labels) for n in "ab"}
    expected = torch.autograd.grad(2 * hard["a"] + hard["b"], [weight["a"], weight["b"], hidden["a"]])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("upstream", [1.0, 0.25, -3.0])
def test_upstream_gradient_scales(impl, upstream):
    case = make(edges=BOTH_WAYS)
    expected, got = gradients(case, upstream * oracle(case)[0]), gradients(case, upstream * case.loss(impl=impl).total)
    assert max(error(got[name], expected[name]) for name in expected) < 1e-12


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_denominator_divides(impl):
    case = make(edges=BOTH_WAYS)
    whole = case.loss(impl=impl, denominator=torch.tensor(2.0))
    tenth = case.loss(impl=impl, denominator=torch.tensor(20.0))
    assert tenth.total.item() == pytest.approx(whole.total.item() / 10, rel=1e-12)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_predict_gives_zero(impl, rows):
    case = make(rows=rows, edges=BOTH_WAYS)
    case.row_weight = torch.zeros(rows)
    out = case.loss(impl=impl)
    assert out.total == 0
    assert all(loss == 0 for loss in (*out.hard.values(), *out.soft))
    assert all(gradient.count_nonzero() == 0 for gradient in gradients(case, out.total).values())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_rows_added_for_alignment_are_cut(impl):
    """Weights of 11 and 16 rows for 11 tokens: what the extra rows hold does not matter, and they get gradient 0."""
    case, padded = make(edges=BOTH_WAYS), make(edges=BOTH_WAYS)
    extra = torch.full((5, 3), 1e6, dtype=torch.float64)
    padded.weight["bob"] = torch.cat([case.weight["bob"].detach(), extra]).requires_grad_()
    padded.bias["bob"] = torch.cat([case.bias["bob"].detach(), extra[:, 0]]).requires_grad_()
    out, cut = case.loss(impl=impl), padded.loss(impl=impl, vocabulary=11)
    expected, got = gradients(case, out.total), gradients(padded, cut.total)
    assert cut.total == out.total
    for name in expected:
        assert torch.equal(got[name][: len(expected[name])], expected[name])
        assert got[name][len(expected[name]) :].count_nonzero() == 0


@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("bias",), ("hidden", "bias")])
def test_part_of_a_member_may_be_frozen(trained):
    case = make(edges=BOTH_WAYS)
    for kind in {"hidden", "weight", "bias"} - set(trained):
        getattr(case, kind)["ann"].requires_grad_(False)
    assert worst_error(case, impl="chunked") < 1e-12


def test_a_bias_is_optional():
    case = make(edges=BOTH_WAYS)
    expected = case.loss(impl="reference").total
    shifted = {m: b.detach() * 0 for m, b in case.bias.items()}
    arguments = (case.hidden, case.weight)
    options = {"hard_weight": case.hard_weight, "edges": BOTH_WAYS, "row_weight": case.row_weight}
    zero = linear_cohort_loss(*arguments, shifted, case.labels, impl="reference", **options).total
    for impl, bias in itertools.product(IMPLEMENTATIONS, ({}, {"ann": None, "bob": None})):
        out = linear_cohort_loss(*arguments, bias, case.labels, impl=impl, **options).total
        assert out.item() == pytest.approx(zero.item(), rel=1e-12)
        assert out.item() != pytest.approx(expected.item(), rel=1e-3)


def test_tied_weights_add_up():
    """One parameter as the weight of two members, as with tied embeddings: both gradients reach it."""
    case = make(edges=BOTH_WAYS)
    case.hidden["bob"] = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    case.weight["bob"] = case.weight["ann"]
    assert worst_error(case, impl="chunked") < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_members_bits_do_not_depend_on_its_company(dtype):
    edges = [Edge("ann", "bob"), Edge("cyd", "ann", 1.0, 2.0), Edge("ann", "cyd", 0.0), Edge("cyd", "ann", 0.0)]
    alone = make(1, rows=300, vocabulary=1000).to(dtype)
    company = make(3, rows=300, vocabulary=1000, edges=[edges[0], edges[2], edges[3]]).to(dtype)
    for of, other in ((alone.hidden, company.hidden), (alone.weight, company.weight), (alone.bias, company.bias)):
        other["ann"] = of["ann"]
    company.labels, company.row_weight = alone.labels, alone.row_weight
    lone, out = alone.loss(impl="chunked", chunk_rows=64), company.loss(impl="chunked", chunk_rows=64)
    expected, got = gradients(alone, lone.total), gradients(company, out.total)
    assert torch.equal(lone.hard["ann"], out.hard["ann"])
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


def test_chunks_do_not_depend_on_the_rows():
    """A function of vocabulary and device alone; enough rows for the products, and bounded bytes of logits."""
    for vocabulary, device in itertools.product((11, 1000, 30522, 128256, 256000), ("cpu", "cuda")):
        rows = rows_per_chunk(vocabulary, device)
        assert rows == rows_per_chunk(vocabulary, device)
        assert (128 <= rows <= 512) if device == "cpu" else (2048 <= rows <= 8192)
    assert rows_per_chunk(30522, "cpu") == 256
    assert rows_per_chunk(30522, "cuda") == 2048


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_no_gradient_work_without_grad_mode(off, monkeypatch):
    case = make(edges=BOTH_WAYS)
    expected = case.loss(impl="chunked")
    monkeypatch.setattr("codistill.kernels.head.Head.absorb", None)
    with off():
        out = case.loss(impl="chunked")
    assert not out.total.requires_grad
    assert torch.equal(out.total, expected.total)


def test_a_frozen_member_costs_one_product(monkeypatch):
    """Counted where the products are made: three for a trained member, one for a frozen one, in each of two chunks."""
    from codistill.kernels import head

    count = []
    products = {name: getattr(head, name) for name in ("multiply", "multiply_add")}
    for name, product in products.items():
        monkeypatch.setattr(head, name, lambda *given, product=product: (count.append(0), product(*given)))
    make(edges=BOTH_WAYS, frozen=("bob",)).loss(impl="chunked", chunk_rows=4)
    assert len(count) == 2 * (3 + 1)


def test_gradients_are_handed_out_once():
    total = make(edges=BOTH_WAYS).loss(impl="chunked").total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed out already; compute the loss again"):
        total.backward()


def test_a_gradient_becomes_the_parameters_without_a_copy():
    case = make().to(torch.float32)
    total = case.loss(impl="chunked").total
    memory = total.grad_fn.gradients[1].data_ptr()
    total.backward()
    assert memory in {tensor.grad.data_ptr() for tensor in case.parameters().values()}
