#!/bin/sh
# Everything about the vocabulary loss that needs a GPU, in under 10 minutes: the kernel's tests, then the benchmark.
# Run it in the repository root; results go to $OUT if that is set. Peers are measured if installed:
#   pip install liger-kernel flash-linear-attention fla-core cut-cross-entropy quack-kernels
set -eu
export PYTHONPATH=src
python -m pytest tests/test_kernels_triton.py -q -m "slow or not slow" --deselect tests/test_kernels_triton.py::test_in_the_interpreter
timeout 480 python benchmarks/loss/measure.py gpu
if [ -n "${OUT:-}" ]; then cp benchmarks/loss/gpu-*.json "$OUT"; fi
