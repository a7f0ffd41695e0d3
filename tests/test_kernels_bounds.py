"""What the vocabulary loss refuses, which implementation it takes, and how much memory it may hold."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from codistill.divergences import forward_kl
from codistill.errors import UserError
from codistill.kernels import Edge, linear_cohort_loss
from codistill.kernels.loss import _chosen, _has_triton
from codistill.kernels.problem import check_labels, checked
from cohort_cases import make

BOTH_WAYS = [Edge("ann", "bob"), Edge("bob", "ann", 0.5, 2.0, "reverse_kl")]


def peak_bytes(work) -> int:
    """The most bytes of tensors that lived at once while `work` ran, beyond those that lived before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as trace:
        work()
    sizes = [event.nbytes() for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(sizes))


def test_peak_memory_does_not_depend_on_the_rows():
    """Beyond the features' gradient, which is the result, and a few numbers a row."""
    vocabulary, chunk = 3000, 64

    def peak(rows: int) -> int:
        case = make(rows=rows, vocabulary=vocabulary, edges=BOTH_WAYS).to(torch.float32)
        found = peak_bytes(lambda: case.loss(impl="chunked", chunk_rows=chunk).total.backward())
        return found - sum(hidden.nbytes for hidden in case.hidden.values())

    few, many = peak(4 * chunk), peak(40 * chunk)
    assert many - few <= 36 * chunk * 64
    assert many < 40 * chunk * vocabulary * 4, "one tensor of rows × vocabulary"


def test_one_logits_buffer_a_member():
    """Two members' peak is their gradients, one chunk of logits each, and scratch of 14 blocks of 8 MB."""
    case = make(rows=2048, vocabulary=20000, edges=BOTH_WAYS).to(torch.float32)
    chunk, scratch = 512 * 20000 * 4, 14 * 2**21 * 4
    assert peak_bytes(lambda: case.loss(impl="chunked", chunk_rows=512).total.backward()) < 2 * chunk + scratch + 5e6


def edge(**changes) -> list[Edge]:
    return [Edge("ann", "bob")._replace(**changes)]


LOGITS = {
    "hidden": {"ann": torch.zeros(7, 5), "bob": torch.zeros(7, 11)},
    "weight": {"ann": torch.zeros(11, 5), "bob": None},
    "bias": {},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, 11, 1, 2, 3, 4, 5])}, "labels: 11 is outside the vocabulary of 11"),
        ({"labels": torch.tensor([0, -100, 1, 2, 3, 4, 5])}, "labels: -100 is outside the vocabulary of 11"),
        ({"labels": torch.zeros(7)}, r"labels: torch.float32 of shape \(7,\); wanted int64"),
        ({"labels": torch.zeros(6, dtype=torch.int64)}, "member 'ann': 7 rows of features for 6 labels"),
        ({"row_weight": torch.ones(6)}, r"row_weight: shape \(6,\) for 7 rows"),
        ({"hard_weight": {"ann": 1.0}}, r"hard_weight: members \['ann'\], but hidden has \['ann', 'bob'\]"),
        ({"hard_weight": {"ann": float("nan"), "bob": 1}}, "hard_weight of 'ann': nan; wanted a finite number"),
        ({"edges": edge(student="ann")}, "edge 'ann' -> 'ann': a member cannot teach itself"),
        ({"edges": edge(teacher="eve")}, "edge 'eve' -> 'bob': no member 'eve'; members are ann, bob"),
        ({"edges": edge(weight=float("inf"))}, "weight of edge 'ann' -> 'bob': inf; wanted a finite number"),
        ({"edges": edge(weight=torch.tensor(float("nan")))}, "weight of edge 'ann' -> 'bob': nan"),
        ({"edges": edge(weight=torch.ones(2))}, r"a tensor of shape \(2,\); wanted a number or a 0-d tensor"),
        ({"edges": edge(temperature=0.0)}, "temperature 0.0; wanted a finite number above 0"),
        ({"edges": edge(divergence="kl")}, "unknown divergence 'kl'; known are forward_kl, reverse_kl"),
        ({"vocabulary": 12}, "vocabulary: 12, but 'ann' has 11 rows; it cannot be padded"),
        ({"vocabulary": 0}, "vocabulary: 0"),
        ({"impl": "fast"}, "impl: 'fast' is not one of reference, chunked, triton"),
        ({"impl": "chunked", "edges": edge(divergence=forward_kl)}, "impl: 'chunked' does not know the divergence"),
        (
            {"impl": "triton", "edges": edge(divergence="squared_error")},
            "impl: 'triton' does not know .*'squared_error'",
        ),
        ({**LOGITS, "impl": "chunked"}, "impl: 'chunked' takes no logits, as 'bob' gives; leave impl out"),
        ({"weight": {"ann": None, "bob": None}}, "vocabulary: 'ann' has 5 rows, 'bob' has 3; pass vocabulary="),
        ({"weight": {"ann": torch.zeros(11, 5), "bob": None}, "vocabulary": 5}, "vocabulary: 5, but 'bob' has 3 rows"),
        ({"weight": {"ann": None, "bob": None}, "vocabulary": 3}, r"labels: \d+ is outside the vocabulary of 3"),
        ({"hidden": {}, "weight": {}}, "hidden: no members"),
        ({"weight": {"ann": torch.zeros(11, 5)}}, r"weight: members \['ann'\]"),
        ({"weight": {"ann": torch.zeros(11, 4), "bob": torch.zeros(11, 3)}}, r"\(7, 5\) and weight \(11, 4\) do not"),
        ({"weight": {"ann": torch.zeros(16, 5), "bob": torch.zeros(11, 3)}, "bias": {}}, "'ann' has 16 rows, 'bob'"),
        ({"bias": {"ann": torch.zeros(12)}}, r"member 'ann': bias \(12,\); wanted \(11,\)"),
        ({"hidden": {"ann": torch.zeros(7, 5), "bob": torch.zeros(7, 3).double()}}, "float64 members and others"),
        ({"chunk_rows": 0}, "chunk_rows: 0; wanted at least 1"),
    ],
)
def test_bad_input(change, message):
    case = make(edges=BOTH_WAYS)
    arguments = vars(case) | change
    with pytest.raises(UserError, match=message):
        linear_cohort_loss(**arguments)


def test_logits_of_fewer_or_more_rows_than_labels_are_refused():
    case = make()
    case.weight["ann"], case.hidden["ann"] = None, torch.zeros(6, 11)
    with pytest.raises(UserError, match=r"member 'ann': torch.float32 logits \(6, 11\) for 7 labels"):
        case.loss()


def test_logits_in_place_of_features_give_the_same_loss():
    whole, given = make(edges=BOTH_WAYS), make(edges=BOTH_WAYS)
    logits = given.hidden["ann"] @ given.weight["ann"].T + given.bias["ann"]
    given.weight["ann"], given.bias["ann"], given.hidden["ann"] = None, None, logits
    expected, got = whole.loss(impl="reference"), given.loss()
    torch.testing.assert_close(got.total, expected.total, rtol=1e-12, atol=0)
    assert torch.autograd.grad(got.total, logits)[0].abs().max() > 0


def test_an_int_is_no_features():
    case = make()
    case.hidden["ann"] = case.hidden["ann"].long()
    with pytest.raises(UserError, match=r"member 'ann': torch.int64 features"):
        case.loss()


def test_labels_on_a_device_are_not_looked_at():
    check_labels(torch.zeros(5, dtype=torch.int64, device="meta"), 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what happens without a CUDA device")
def test_triton_needs_its_device(monkeypatch):
    monkeypatch.setattr("codistill.kernels.loss._interpreted", lambda: False)
    with pytest.raises(UserError, match="impl: 'triton' needs a CUDA device, not cpu"):
        make().loss(impl="triton")


@pytest.mark.parametrize(
    ("device", "triton", "divergence", "expected"),
    [
        ("cpu", True, "forward_kl", "chunked"),
        ("meta", True, "forward_kl", "chunked"),
        ("cpu", False, forward_kl, "reference"),
        ("cuda", True, "forward_kl", "triton"),
        ("cuda", False, "forward_kl", "chunked"),
        ("cuda", True, forward_kl, "reference"),
        ("cuda", True, "squared_error", "chunked"),
    ],
)
def test_dispatch(monkeypatch, device, triton, divergence, expected):
    monkeypatch.setattr("codistill.kernels.loss._has_triton", lambda: triton)
    assert _chosen(None, problem_on(device, edge(divergence=divergence))) == expected


def problem_on(device, edges):
    """A problem that says it lies on `device`."""
    case = make(edges=edges)
    problem = checked(case.hidden, case.weight, case.bias, case.labels, case.hard_weight, case.edges, None, None, None)
    object.__setattr__(problem, "labels_N", SimpleNamespace(device=torch.device(device)))
    return problem


def test_a_gpu_without_what_triton_needs_goes_on_and_says_so_once(monkeypatch, capsys):
    problem = problem_on("cuda", edge())
    monkeypatch.setattr("codistill.kernels.loss.why_not_triton", lambda: "there is no C compiler")
    monkeypatch.setattr("codistill.kernels.loss._interpreted", lambda: False)
    _has_triton.cache_clear()
    try:
        assert [_chosen(None, problem), _chosen(None, problem)] == ["chunked", "chunked"]
    finally:
        _has_triton.cache_clear()
    said = "codistill: continuing without the loss in Triton, which is faster: there is no C compiler\n"
    assert capsys.readouterr().err == said
    with pytest.raises(UserError, match="impl: 'triton' cannot run on this machine: there is no C compiler; use"):
        _chosen("triton", problem)


def test_a_custom_divergence_is_differentiated():
    """A function of two logits and a temperature: here forward KL by its name and as a function."""
    named, custom = make(edges=edge(divergence="forward_kl")), make(edges=edge(divergence=forward_kl))
    assert torch.equal(named.loss(impl="reference").total, custom.loss().total)


def test_vocabularies_padded_differently():
    """151,936 and 152,064 rows for one tokenizer, as two sizes of one model family ship them."""
    tokens, case = 151_665, make(rows=2, edges=BOTH_WAYS)
    for member, rows in (("ann", 151_936), ("bob", 152_064)):
        case.weight[member] = torch.zeros(rows, case.hidden[member].shape[1], dtype=torch.float64, requires_grad=True)
        case.bias[member] = torch.zeros(rows, dtype=torch.float64)
    case.row_weight, case.hard_weight = torch.ones(2), {"ann": 1.0, "bob": 1.0}
    out = case.loss(vocabulary=tokens)
    out.total.backward()
    assert out.hard["ann"].item() == pytest.approx(torch.tensor(tokens).double().log().item())
    assert case.weight["bob"].grad.shape == (152_064, 3)
    assert case.weight["bob"].grad[tokens:].count_nonzero() == 0
    with pytest.raises(UserError, match="'bob' has 152064 rows, 'ann' has 151936; pass vocabulary="):
        case.loss()
