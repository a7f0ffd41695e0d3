"""The library on a pretended GPU (tests/pretended): the numbers are those of the CPU, and no step waits."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
COMPILER = shutil.which("g++")
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="there is no g++ to compile what pretends to be a GPU"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this build of PyTorch has a GPU's parts of its own"),
    pytest.mark.skipif(sys.platform != "linux", reason="the compiler is called as on Linux"),
]


@pytest.fixture(scope="module")
def seen(text, tmp_path_factory) -> dict:
    """What tests/pretended/check.py prints."""
    place, of_torch = tmp_path_factory.mktemp("pretended"), Path(torch.__file__).parent
    library = place / "libgpu.so"
    flags = ["-shared", "-fPIC", "-std=c++20", f"-I{of_torch / 'include'}", f"-L{of_torch / 'lib'}"]
    flags += [f"-Wl,-rpath,{of_torch / 'lib'}", "-Wl,--no-as-needed", "-lc10", "-ltorch_cpu", "-o", str(library)]
    subprocess.run([str(COMPILER), str(TESTS / "pretended" / "gpu.cpp"), *flags], check=True)
    environment = os.environ | {"PRETENDED_GPU": str(library), "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    command = [sys.executable, "-W", "ignore", str(TESTS / "pretended" / "check.py"), str(text), str(place)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("what", ["ctcd", "other_edges", "documents", "cached", "begun", "scored"])
def test_what_comes_out_is_what_comes_out_on_a_cpu(what, seen):
    on_the_cpu, there = seen["found"][what]
    assert there == pytest.approx(on_the_cpu, rel=1e-5)


def test_a_text_goes_on_as_on_a_cpu(seen):
    on_the_cpu, there = seen["found"]["continued"]
    assert there == on_the_cpu


def test_a_label_that_is_no_token_is_refused_or_stops_the_run(seen):
    on_the_cpu, there = seen["found"]["wrong_label"]
    assert "labels: 50 is outside the vocabulary of 50" in on_the_cpu
    assert there.startswith("step 1: the loss or gradient of one and two was not finite")


def test_precision_is_that_of_the_gpu(seen):
    assert seen["found"]["bfloat16"] == "bfloat16"


def test_no_step_waits_for_the_gpu(seen):
    assert seen["in a step"] == []
    assert any(read.startswith("watch.py") for read in seen["reads"])  # asked where it is logged


def test_batches_are_copied_from_pinned_memory(seen):
    stacks = [[name for name in stack.split() if name != "objectives.py"] for stack in seen["waits"]]
    by = {stack[-1] for stack in stacks if stack}
    assert "build.py" in by  # the held-out text, once a run: such copies are noticed
    assert "train.py" not in by
