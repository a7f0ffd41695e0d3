"""Compiled layers and kept memory change the speed, and of the numbers no more than roundings."""

import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._inductor import config as inductor

from codistill.build import build
from codistill.cohort import Cohort, Distillation
from codistill.kernels import compiled_rows
from codistill.loading import load, override, read_run, to_dict
from codistill.machine import (
    compile_layers,
    compiler_failure,
    device_name,
    is_out_of_memory,
    why_not_compile,
    why_not_triton,
)
from codistill.recipes import find
from codistill.train import Stopped, train
from cohorts import batch, member
from plans import planned_and_counted_memory
from runs import assert_same_run, small_run

# PyTorch's compiler warns of gradients that it looks for itself.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
COMPILES = pytest.mark.skipif(
    why_not_compile(torch.device("cpu")) is not None, reason="this machine has no C++ compiler"
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def gradients(compiled: bool) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    members = [member(name, layers, dropout=0.0) for name, layers in (("ann", 1), ("bob", 1))]
    if compiled:
        for one in members:
            compile_layers(one.predictor.model)
    edges = [Distillation("ann", "bob"), Distillation("bob", "ann")]
    metrics = Cohort(members, edges, compiled=compiled).gradients(0, [batch(1)])
    return metrics, [p.grad for one in members for p in one.parameters if p.grad is not None]


@COMPILES
def test_compiled_layers_give_the_same_losses_and_gradients(monkeypatch):
    from torch._dynamo.utils import counters

    calls = []
    fused = compiled_rows.sweep
    monkeypatch.setattr(compiled_rows, "sweep", lambda *given: (calls.append(0), fused(*given))[1])
    counters.clear()
    metrics, wanted = gradients(compiled=False)
    assert not counters["stats"]
    assert not calls
    found_metrics, found = gradients(compiled=True)
    assert counters["stats"]["unique_graphs"] >= 1
    assert not counters["graph_break"]
    assert calls
    for name, value in metrics.items():
        torch.testing.assert_close(found_metrics[name], value, rtol=1e-5, atol=1e-6)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@COMPILES
@pytest.mark.slow
def test_a_compiled_run_resumes_bit_for_bit_and_is_scored_without_the_compiler(text, tmp_path, monkeypatch):
    run = small_run("ctcd:tiny", text, "compile=true", "steps=4", "checkpoint.every=2", "evaluate.every=4")
    whole = train(run, tmp_path / "whole", device="cpu")
    with pytest.raises(Stopped):
        train(run, tmp_path / "parts", device="cpu", stop_at=2)
    torch.compiler.reset()
    assert_same_run(whole, train(run, tmp_path / "parts", device="cpu", resume=True))
    assert read_run(whole / "run.yaml")["compile"] is True
    resolved = replace(run, precision="float32")
    assert build(resolved, torch.device("cpu")).cohort.compiled


@COMPILES
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_plan_of_a_compiled_runs_memory_is_within_15_percent(precision):
    settings = ["members.large.model.width=128", "members.small.model.width=64", "data.tokenizer=train:wordpiece:8000"]
    settings += ["compile=true", f"precision={precision}", "batch.sequences=16"]
    planned, counted = planned_and_counted_memory(load(override(to_dict(find("ctcd:tiny")), settings)))
    assert planned == pytest.approx(counted, rel=0.15)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
            True,
        ),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
    ids=["cuda", "cpu", "python", "another"],
)
def test_what_is_raised_for_want_of_memory(error, expected):
    assert is_out_of_memory(error) is expected


def test_a_machine_that_cannot_compile_says_so_and_goes_on(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("codistill.build.compile_layers", None)  # or it would be called
    run = small_run("standalone:tiny", text, "compile=true", "steps=2")
    with inductor.patch({"cpp.cxx": (None, "/no/such/compiler")}):
        out = train(run, tmp_path / "run", device="cpu")
    assert "continuing without compilation, which this machine cannot do: " in capsys.readouterr().err
    assert read_run(out / "run.yaml")["compile"] is False


@COMPILES
def test_a_machine_without_pythons_header_files_cannot_compile(tmp_path, monkeypatch):
    """Debian and Ubuntu have them in a package of their own."""
    assert why_not_compile(torch.device("cpu")) is None
    monkeypatch.setattr("sysconfig.get_path", lambda *_: str(tmp_path))
    assert f"{tmp_path} has no Python.h; install the header files" in why_not_compile(torch.device("cpu"))


def test_what_a_gpus_machine_lacks_for_triton_is_named(tmp_path, monkeypatch):
    machine = {"gcc": "/usr/bin/gcc"}
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("codistill.machine.find_spec", machine.get)
    monkeypatch.setattr("codistill.machine.which", machine.get)
    monkeypatch.setattr("sysconfig.get_path", lambda *_: str(tmp_path))
    assert why_not_triton() == "the package triton is not installed"
    machine["triton"] = "triton"
    assert "has no Python.h; install the header files" in why_not_triton()
    (tmp_path / "Python.h").touch()
    assert why_not_triton() is None
    machine["gcc"] = None
    assert why_not_triton() == "there is no C compiler (gcc, clang, or what the environment's CC names)"
    monkeypatch.setenv("CC", "/opt/cc")
    assert why_not_triton() is None
    assert why_not_compile(torch.device("cuda")) is None


def test_a_failure_of_the_compiler_is_told_by_its_cause():
    from torch._dynamo.exc import BackendCompilerFailed

    failure = BackendCompilerFailed("inductor", KeyError("buf10"), None)
    assert compiler_failure(failure) == "KeyError: 'buf10'"
    assert compiler_failure(KeyError("buf10")) is None


@pytest.mark.skipif(sys.platform != "linux", reason="the C library's allocator is told on Linux only")
def test_memory_that_a_step_frees_is_there_for_the_next():
    program = """
import ctypes, resource, sys, torch
from codistill.machine import keep_freed_memory
ctypes.CDLL(None).mallopt(-3, 2**17)  # as if the allocator had learned nothing yet from what was freed
if sys.argv[1] == "keep":
    keep_freed_memory()
for turn in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2**20) for _ in range(16)]  # 4 MiB each, 1024 pages
    del tensors
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""
    command = [sys.executable, "-c", program]
    faults = {how: int(subprocess.check_output([*command, how])) for how in ("keep", "leave")}
    assert faults["leave"] > 1000
    assert faults["keep"] < faults["leave"] / 4


INTEL = "processor : 0\nmodel name : A CPU\ncpu family : 6\nmodel : 167\nflags : fpu avx2 amx_bf16\n\nprocessor : 1\n"
ARM = "processor : 0\nBogoMIPS : 2100.00\nFeatures : fp asimd\n"


@pytest.mark.parametrize(
    ("cpuinfo", "name"), [(INTEL, "A CPU (family 6 model 167; avx2, amx_bf16)"), (ARM, platform.machine())]
)
def test_a_processor_is_named_with_what_its_products_depend_on(cpuinfo, name, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda path, **_: cpuinfo if str(path) == "/proc/cpuinfo" else 1 / 0)
    assert device_name(torch.device("cpu")) == name
