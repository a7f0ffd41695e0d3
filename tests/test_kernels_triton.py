"""The Triton kernel against the oracle: in its interpreter on any machine, and on the GPU where there is one."""

import contextlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from packaging.version import Version

from codistill.kernels import Edge, head
from cohort_cases import (
    NAMES,
    close_members,
    edge_sets,
    error,
    errors,
    gradients,
    make,
    multiply_as_on_cuda,
    oracle,
    train,
    worst_error,
)

triton = pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
kernel = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="no GPU; test_in_the_interpreter runs it with TRITON_INTERPRET=1"
)
# On a GPU the PyTorch sweep is put through the same tests.
IMPLEMENTATIONS = ["triton", "chunked"] if DEVICE == "cuda" else ["triton"]
SLOW = [(252, 1000), (507, 11), (7, 30522)]
# Where a GPU rounds to the nearest bfloat16, the interpreter cuts: twice the error.
ROUNDING = 1 if DEVICE == "cuda" else 2.2
DIVERGENCES = ["forward_kl", "reverse_kl", "jensen_shannon"]


@pytest.mark.skipif(INTERPRETED, reason="is in it")
@pytest.mark.parametrize("marked", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_in_the_interpreter(marked):
    """A process of its own: Triton reads the variable once, and everything it compiles follows."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    given = __file__.replace("triton", "given")
    if Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4"):
        pytest.skip("Triton's interpreter before 3.7 cannot do with NumPy 2.4")
    command = [sys.executable, "-m", "pytest", __file__, given, "-q", "-p", "no:cacheprovider", "-m", marked]
    command += ["-W", "ignore:Conversion of an array:DeprecationWarning"]  # of the same, with NumPy before
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.fixture(autouse=True)
def poisoned():
    """Buffers start as NaN, as in test_kernels."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@kernel
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("members", [1, 2, 3, 4])
def test_equals_autograd(impl, members):
    sets = edge_sets(members)
    for index in range(len(sets) - 1, -1, -max(1, len(sets) // 3)):
        case = make(members, edges=sets[index], frozen=NAMES[: index % (members + 1)], seed=index)
        assert worst_error(case.on(DEVICE), impl=impl, chunk_rows=3) < 1e-12


@kernel
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_and_temperature(impl, divergence, temperature):
    edges = [Edge("ann", "bob", 0.7, temperature, divergence), Edge("bob", "ann", 1.3, temperature, divergence)]
    assert worst_error(make(edges=edges, spread=4.0).on(DEVICE), impl=impl) < 1e-12


@kernel
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("rows", "vocabulary"),
    [(1, 11), (7, 1000), (1, 30522), (3, 4096), (3, 4097), *(pytest.param(*s, marks=pytest.mark.slow) for s in SLOW)],
)
def test_odd_shapes(impl, rows, vocabulary):
    edges = [Edge("ann", "bob", 1.0, 2.0, "forward_kl"), Edge("bob", "ann", torch.tensor(0.5), 1.0, "reverse_kl")]
    case = make(rows=rows, vocabulary=vocabulary, edges=edges).on(DEVICE)
    case.row_weight[0] = 0.5
    assert worst_error(case, impl=impl) < 1e-12


@kernel
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_logits_far_apart_in_different_blocks_do_not_overflow(impl):
    """The sums so far are scaled to the highest peak, in whichever block: e^1000 is more than float64 holds."""
    edges = [Edge("ann", "bob", 1.0, 2.0), Edge("bob", "ann", 1.0, 1.0, "reverse_kl")]
    case = make(rows=3, vocabulary=5000, edges=edges).on(DEVICE)
    with torch.no_grad():
        case.bias["ann"][0] += 1000
        case.bias["bob"][4500] += 1000
    assert worst_error(case, impl=impl) < 1e-12


@kernel
def test_agrees_with_the_other_implementations_on_padded_weights():
    case = make(edges=[Edge("ann", "bob"), Edge("bob", "ann")]).on(DEVICE)
    case.labels = case.labels % 9
    chunked, found = (case.loss(impl=impl, vocabulary=9) for impl in ("chunked", "triton"))
    assert found.total.item() == pytest.approx(chunked.total.item(), rel=1e-12)


@kernel
def test_a_members_bits_do_not_depend_on_its_company():
    alone = make(1, rows=20, vocabulary=1000).to(torch.float32).on(DEVICE)
    edges = [Edge("ann", "bob"), Edge("ann", "cyd", 0.0), Edge("cyd", "ann", 0.0)]
    company = make(3, rows=20, vocabulary=1000, edges=edges).to(torch.float32).on(DEVICE)
    for of, other in ((alone.hidden, company.hidden), (alone.weight, company.weight), (alone.bias, company.bias)):
        other["ann"] = of["ann"]
    company.labels, company.row_weight = alone.labels, alone.row_weight
    lone, out = alone.loss(impl="triton"), company.loss(impl="triton")
    expected, got = gradients(alone, lone.total), gradients(company, out.total)
    assert torch.equal(lone.hard["ann"], out.hard["ann"])
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


@kernel
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_three_ways(impl, dtype, divergence, monkeypatch):
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        multiply_as_on_cuda(monkeypatch)
    edges = [Edge("ann", "bob", 1.0, 2.0, divergence), Edge("bob", "ann", 1.0, 1.0, divergence)]
    case = make(rows=20, vocabulary=1000, edges=edges).to(dtype).on(DEVICE)
    exact = case.to(torch.float64)
    true_total, plain_total, out = oracle(exact)[0], oracle(case, dtype)[0], case.loss(impl=impl)
    true, plain, ours = gradients(exact, true_total), gradients(case, plain_total), gradients(case, out.total)
    chance = 4 * torch.finfo(torch.float32).eps if dtype == torch.float32 else 0.1 * torch.finfo(dtype).eps
    for name in true:
        assert error(ours[name], true[name]) <= ROUNDING * error(plain[name], true[name]) + chance, name


@kernel
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_members_of_different_types(impl, monkeypatch):
    """Gradients of float32 and of bfloat16 members lie over their logits at different distances from row to row."""
    if DEVICE == "cpu":
        multiply_as_on_cuda(monkeypatch)
        monkeypatch.setattr(head, "_products", lambda hidden: (hidden.dtype, contextlib.nullcontext))
    edges = [Edge("ann", "bob"), Edge("bob", "ann")]
    case = make(rows=20, vocabulary=1000, edges=edges).to(torch.float32).on(DEVICE)
    case.hidden["bob"] = case.hidden["bob"].detach().bfloat16().requires_grad_()
    exact = case.to(torch.float64)
    true, ours = gradients(exact, oracle(exact)[0]), gradients(case, case.loss(impl=impl).total)
    for name in true:
        assert error(ours[name], true[name]) <= 2 * torch.finfo(torch.bfloat16).eps, name


@kernel
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_small_divergence_keeps_its_digits_in_float32(divergence):
    """As in test_kernels_precision: Bregman's form."""
    case = close_members(0.03, 20.0).on(DEVICE)
    case.hidden = {m: h.float()[:16] for m, h in case.hidden.items()}
    case.labels, case.edges = case.labels[:16], [Edge("ann", "bob", 1.0, 1.0, divergence)]
    (true,), (plain,) = oracle(case)[2], oracle(case, torch.float32)[2]
    assert error(case.loss(impl="triton").soft[0], true) < max(error(plain, true) / 3, 1e-6)


@kernel
@pytest.mark.parametrize("hard", [0.0, 1.0])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradient_of_a_small_kl_in_bfloat16(impl, hard, monkeypatch):
    if DEVICE == "cpu":
        multiply_as_on_cuda(monkeypatch)
    kl, found = errors(train(close_members(0.03, 20.0, hard).on(DEVICE)), impl)
    assert 5e-4 < kl / 2 < 2e-3
    assert max(found.values()) < 2e-3 * ROUNDING, found


@pytest.mark.skipif(INTERPRETED, reason="compiles in earnest")
def test_it_compiles_for_a_gpu_that_is_not_here():
    """The interpreter takes Python that the compiler refuses: compile to PTX for an H100, without one."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "compiled" in done.stdout


COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Absent:
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device=None: 0

driver.set_active(Absent())
from codistill.kernels import Edge, triton_rows
from codistill.kernels.head import Head
from codistill.kernels.problem import checked

empty = {m: torch.zeros(4, 8) for m in "ab"}
weight, bias = {m: torch.zeros(100, 8) for m in "ab"}, {"a": torch.zeros(100), "b": None}
edges = [Edge("a", "b", 1.0, 2.0, "jensen_shannon"), Edge("b", "a", 1.0, 1.0, "reverse_kl"), Edge("a", "b")]
labels = torch.zeros(4, dtype=torch.int64)
problem = checked(empty, weight, bias, labels, dict.fromkeys("ab", 1.0), edges, None, None, None)
heads = {m: Head(empty[m], weight[m], bias[m], 100, 4, (True, True, True)) for m in "ab"}
logits = {m: head.logits(slice(0, 4)) for m, head in heads.items()}
for head in heads.values():
    head.operand = torch.bfloat16
kernel = triton_rows._row_kernel

class Compile:
    def __getitem__(self, grid):
        return lambda *arguments, **options: kernel.warmup(*arguments, grid=grid, **options)

triton_rows._row_kernel = Compile()
triton_rows.sweep(problem, heads, logits, slice(0, 4))
print("compiled")
"""
