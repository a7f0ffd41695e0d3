"""The vocabulary loss with what lies between its products left to PyTorch's compiler: the same numbers, and how many
times something is compiled."""

import random

import pytest
import torch

from codistill.kernels import Edge, compiled_rows
from codistill.machine import why_not_compile
from cohort_cases import NAMES, close_members, edge_sets, error, gradients, make, oracle, train, worst_error
from test_kernels_bounds import peak_bytes

BOTH_WAYS = [Edge("ann", "bob", 0.7, 2.0), Edge("bob", "ann", 1.3, 1.0, "reverse_kl")]


@pytest.fixture
def as_written(monkeypatch):
    """The formulas without the compiler, which would take seconds for each case."""
    monkeypatch.setattr(compiled_rows, "_compiled", lambda: compiled_rows.solve_block)


@pytest.fixture
def compiler():
    """Counters of what PyTorch compiled in this test."""
    from torch._dynamo.utils import counters

    if (reason := why_not_compile(torch.device("cpu"))) is not None:
        pytest.skip(f"this machine cannot compile: {reason}")
    torch.compiler.reset()
    counters.clear()
    yield counters["stats"]
    torch.compiler.reset()


def compiled(case, **options):
    return case.loss(impl="chunked", compiled=True, **options)


@pytest.mark.usefixtures("as_written")
@pytest.mark.parametrize("members", [1, 2, 3, 4])
def test_the_formulas_equal_autograd(members):
    sets = edge_sets(members)
    for index, edges in enumerate(random.Random(members).sample(sets, min(24, len(sets)))):
        case = make(members, edges=edges, frozen=NAMES[: index % (members + 1)], seed=index)
        assert worst_error(case, impl="chunked", compiled=True, chunk_rows=3) < 1e-12


@pytest.mark.usefixtures("as_written")
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon", "squared_error"])
def test_every_divergence_and_temperature(divergence, temperature):
    edges = [Edge("ann", "bob", 0.7, temperature, divergence), Edge("bob", "ann", 1.3, temperature, divergence)]
    assert worst_error(make(edges=edges, spread=4.0), impl="chunked", compiled=True) < 1e-12


@pytest.mark.usefixtures("as_written")
def test_many_blocks_in_a_chunk(monkeypatch):
    monkeypatch.setattr(compiled_rows, "rows_per_block", lambda vocabulary, device: 4)
    case = make(3, rows=23, edges=[*BOTH_WAYS, Edge("cyd", "ann", 2.0, 2.0, "jensen_shannon")])
    assert worst_error(case, impl="chunked", compiled=True, chunk_rows=10) < 1e-12


def test_compiled_it_equals_autograd_and_is_compiled_once(compiler):
    """Rows and weights may change from call to call; only a last chunk of a single row is another function."""
    for index, rows in enumerate((7, 14, 12)):
        edges = [edge._replace(weight=edge.weight + index) for edge in BOTH_WAYS]
        case = make(rows=rows, vocabulary=40, edges=edges, seed=index)
        case.hard_weight = {"ann": 1.0 + index, "bob": torch.tensor(0.25 * index)}
        assert worst_error(case, impl="chunked", compiled=True, chunk_rows=5) < 1e-12
    assert compiler["unique_graphs"] == 1
    case = make(rows=6, vocabulary=40, edges=BOTH_WAYS)
    assert worst_error(case, impl="chunked", compiled=True, chunk_rows=5) < 1e-12
    assert compiler["unique_graphs"] == 2


@pytest.mark.usefixtures("compiler")
def test_compiled_with_a_frozen_member_squared_errors_and_rows_for_alignment():
    edges = [Edge("ann", "bob", 0.7, 1.0, "squared_error"), Edge("cyd", "bob", 0.5, 2.0), Edge("cyd", "ann", 1.3)]
    case = make(3, rows=9, vocabulary=40, edges=edges, frozen=("cyd",))
    assert worst_error(case, impl="chunked", compiled=True, chunk_rows=4) < 1e-12
    extra = torch.full((8, 5), 1e6, dtype=torch.float64)
    padded = make(3, rows=9, vocabulary=40, edges=edges, frozen=("cyd",))
    padded.weight["ann"] = torch.cat([case.weight["ann"].detach(), extra]).requires_grad_()
    padded.bias["ann"] = torch.cat([case.bias["ann"].detach(), extra[:, 0]]).requires_grad_()
    assert compiled(padded, chunk_rows=4, vocabulary=40).total == compiled(case, chunk_rows=4).total


def test_what_the_compiler_fails_at_is_computed_as_it_is_written(monkeypatch, capsys):
    """By itself: another structure, or a block of a single row, may compile."""
    asked = []

    def compiled_block(*arguments):
        asked.append((len(arguments[-1].edges), len(arguments[1])))
        if asked[-1] == (2, 5):
            raise torch._dynamo.exc.TorchDynamoException("KeyError: 'buf10'\nand much more")
        return compiled_rows.solve_block(*arguments)

    monkeypatch.setattr(compiled_rows, "_compiled", lambda: compiled_block)
    monkeypatch.setattr(compiled_rows, "_uncompiled", set())
    assert worst_error(make(rows=11, edges=BOTH_WAYS), impl="chunked", compiled=True, chunk_rows=5) < 1e-12
    assert worst_error(make(rows=5, edges=BOTH_WAYS[:1]), impl="chunked", compiled=True, chunk_rows=5) < 1e-12
    assert asked == [(2, 5), (2, 1), (1, 5)]
    said = "codistill: continuing without compilation of the loss, in which PyTorch failed: KeyError: 'buf10'\n"
    assert capsys.readouterr().err == said


def test_any_other_error_of_the_loss_is_raised(monkeypatch):
    def failing(*_):
        raise RuntimeError("of another kind")

    monkeypatch.setattr(compiled_rows, "_compiled", lambda: failing)
    with pytest.raises(RuntimeError, match="of another kind"):
        compiled(make(rows=5))


@pytest.mark.usefixtures("compiler")
def test_float32_is_as_exact_as_plain_pytorch():
    edges = [Edge("ann", "bob", 1.0, 2.0), Edge("bob", "ann", 1.0, 1.0, "jensen_shannon")]
    case = make(rows=252, vocabulary=1000, edges=edges, spread=4.0).to(torch.float32)
    exact = case.to(torch.float64)
    true_total, plain_total, out = oracle(exact)[0], oracle(case, torch.float32)[0], compiled(case)
    true, plain, ours = gradients(exact, true_total), gradients(case, plain_total), gradients(case, out.total)
    assert error(out.total.detach(), true_total) <= error(plain_total.detach(), true_total) + 1e-6
    for name in true:
        assert error(ours[name], true[name]) <= error(plain[name], true[name]) + 4 * torch.finfo(torch.float32).eps


@pytest.mark.usefixtures("compiler")
def test_a_small_divergence_keeps_its_digits_in_float32():
    """As in test_kernels_precision: Bregman's form, of all three divergences in one function."""
    case = close_members(0.03, 20.0)
    case.hidden = {m: h.float() for m, h in case.hidden.items()}
    case.edges = [Edge("ann", "bob", 1.0, 1.0, kind) for kind in ("forward_kl", "reverse_kl", "jensen_shannon")]
    true, plain = oracle(case)[2], oracle(case, torch.float32)[2]
    for ours, theirs, exact in zip(compiled(case).soft, plain, true, strict=True):
        assert error(ours, exact) < error(theirs, exact) / 3


@pytest.mark.usefixtures("compiler")
def test_the_gradient_of_a_small_kl_keeps_its_digits_under_autocast():
    case = train(close_members(0.03))
    exact = case.to(torch.float64)
    true = gradients(exact, oracle(exact)[0])
    with torch.autocast("cpu", torch.bfloat16):
        ours = gradients(case, compiled(case).total)
    assert max(error(ours[name], true[name]) for name in true) < 2e-3


@pytest.mark.usefixtures("compiler")
def test_a_members_bits_do_not_depend_on_its_company():
    alone = make(1, rows=300, vocabulary=1000).to(torch.float32)
    company = make(2, rows=300, vocabulary=1000, edges=[Edge("ann", "bob")]).to(torch.float32)
    for of, other in ((alone.hidden, company.hidden), (alone.weight, company.weight), (alone.bias, company.bias)):
        other["ann"] = of["ann"]
    company.labels, company.row_weight = alone.labels, alone.row_weight
    lone, out = compiled(alone, chunk_rows=64), compiled(company, chunk_rows=64)
    expected, got = gradients(alone, lone.total), gradients(company, out.total)
    assert torch.equal(lone.hard["ann"], out.hard["ann"])
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


@pytest.mark.usefixtures("compiler")
def test_it_holds_less_than_uncompiled():
    """Two members' peak is their gradients, one chunk of logits each, and, for forward KL, one block of 8 MB each."""
    both_ways = [Edge("ann", "bob"), Edge("bob", "ann", 0.5)]
    case = make(rows=1024, vocabulary=20000, edges=both_ways).to(torch.float32)
    compiled(case, chunk_rows=512)  # whatever the compiler itself takes
    chunk, block = 512 * 20000 * 4, 2**21 * 4
    assert peak_bytes(lambda: compiled(case, chunk_rows=512).total.backward()) < 2 * chunk + 2 * block + 5e6
