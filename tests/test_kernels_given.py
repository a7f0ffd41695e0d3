"""Teachers that are given by a few logits of each row: as dense logits of the same numbers, in every implementation."""

import os

import pytest
import torch

from codistill.errors import UserError
from codistill.kernels import Edge, SparseLogits, compiled_rows, linear_cohort_loss

ROWS, SIZE, WIDTH, FEW = 23, 37, 6, 5


def require_triton():
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("test_kernels_triton.py::test_in_the_interpreter runs it with TRITON_INTERPRET=1")


def problem(seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    student = torch.randn(ROWS, WIDTH, generator=draw, dtype=torch.float64).requires_grad_()
    weight = torch.randn(SIZE, WIDTH, generator=draw, dtype=torch.float64).requires_grad_()
    labels = torch.randint(SIZE, (ROWS,), generator=draw)
    full = torch.log_softmax(torch.randn(ROWS, SIZE, generator=draw, dtype=torch.float64), -1)
    log_p, ids = full.topk(FEW, -1)
    rest = ((1 - log_p.exp().sum(-1)) / (SIZE - FEW)).log()
    return student, weight, labels, SparseLogits(ids, log_p, rest)


def dense(given: SparseLogits) -> torch.Tensor:
    rows = []
    for ids, log_p, rest in zip(*(tensor.tolist() for tensor in given), strict=True):
        known = dict(zip(ids, log_p, strict=True))
        rows.append([known.get(token, rest) for token in range(SIZE)])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("impl", ["reference", "chunked", "compiled", "triton"])
@pytest.mark.parametrize(
    ("divergence", "temperature"), [("forward_kl", 1.0), ("reverse_kl", 2.0), ("jensen_shannon", 0.5)]
)
def test_given_logits_are_dense_logits_of_the_same_numbers(impl, divergence, temperature, monkeypatch):
    if impl == "triton":
        require_triton()
    way = {"impl": impl}
    if impl == "compiled":  # its formulas; test_kernels_compiled.py compiles them
        monkeypatch.setattr(compiled_rows, "_compiled", lambda: compiled_rows.solve_block)
        way = {"impl": "chunked", "compiled": True}
    student, weight, labels, given = problem()
    edge = Edge("teacher", "student", 0.7, temperature, divergence)
    settings = {"hard_weight": {"student": 0.5}, "edges": [edge]}
    ours = linear_cohort_loss(
        {"teacher": given, "student": student}, {"student": weight}, {}, labels, chunk_rows=9, **way, **settings
    )
    settings["hard_weight"]["teacher"] = 0.0
    hidden = {"teacher": dense(given), "student": student}
    weights = {"teacher": torch.eye(SIZE, dtype=torch.float64), "student": weight}
    expected = linear_cohort_loss(hidden, weights, {}, labels, impl="reference", **settings)
    assert set(ours.hard) == {"student"}
    torch.testing.assert_close(ours.total, expected.total)
    torch.testing.assert_close(ours.soft[0], expected.soft[0])
    gradients = torch.autograd.grad(ours.total, [student, weight])
    for mine, theirs in zip(gradients, torch.autograd.grad(expected.total, [student, weight]), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g._replace(ids=g.ids + SIZE), "name a token outside the vocabulary of 37"),
        (lambda g: g._replace(log_p=g.log_p[:, 1:]), "sparse logits of shapes"),
    ],
)
def test_bad_sparse_logits_are_refused(change, message):
    student, weight, labels, given = problem()
    features = {"teacher": change(given), "student": student}
    with pytest.raises(UserError, match=message):
        linear_cohort_loss(features, {"student": weight}, {}, labels, hard_weight={"student": 1.0})


def test_sparse_logits_have_no_squared_error():
    student, weight, labels, given = problem()
    edges = [Edge("teacher", "student", divergence="squared_error")]
    features, hard = {"teacher": given, "student": student}, {"student": 1.0}
    with pytest.raises(UserError, match="squared_error compares logits, and sparse ones are log-probabilities"):
        linear_cohort_loss(features, {"student": weight}, {}, labels, hard_weight=hard, edges=edges)


def test_sparse_logits_cannot_learn():
    student, weight, labels, given = problem()
    with pytest.raises(UserError, match="a student needs features, not sparse logits"):
        linear_cohort_loss(
            {"teacher": given, "student": student},
            {"student": weight},
            {},
            labels,
            hard_weight={"student": 1.0},
            edges=[Edge("student", "teacher")],
        )
