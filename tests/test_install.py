"""What a fresh machine installs."""

import re
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
# Which triton a torch's wheels for CUDA require (`Requires-Dist` in their metadata), which pip takes wherever no build
# without CUDA is offered. Another torch needs a line of its own here, looked up there.
REQUIRED_BY_TORCH_FOR_CUDA = {"2.13.0": "3.7.1"}


def test_pip_finds_versions_where_the_build_for_cuda_is_taken():
    pinned = dict(re.findall(r"^([\w-]+)==(.+)$", CONSTRAINTS.read_text(), flags=re.MULTILINE))
    assert pinned["triton"] == REQUIRED_BY_TORCH_FOR_CUDA[pinned["torch"]]
