#!/bin/sh
# Everything about the vocabulary loss that needs a GPU, in under 10 minutes: the kernel's tests, then the benchmark.
# Run it in the repository root; results go to $OUT if that is set, also those of a benchmark that did not end in time.
# A test that fails is the exit status, and keeps nothing from being measured. Peers are measured if installed:
#   pip install liger-kernel flash-linear-attention fla-core cut-cross-entropy quack-kernels
set -eu
export PYTHONPATH="src:${PYTHONPATH:-}:.gpu/site"
failed=0
trap 'if [ -n "${OUT:-}" ]; then cp benchmarks/loss/gpu-*.json "$OUT" || true; fi' EXIT
timeout 200 python3 -m pytest tests/test_kernels_triton.py -q -n 8 -m "slow or not slow" \
    --deselect tests/test_kernels_triton.py::test_in_the_interpreter || failed=$?
timeout 380 python3 benchmarks/loss/measure.py gpu || failed=$?
exit "$failed"
