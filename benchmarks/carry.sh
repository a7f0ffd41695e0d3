#!/bin/sh
# What benchmarks/*/gpu.sh and `codistill study` need and a machine without a network may lack, into .gpu, which git ignores:
# the command line's own packages, of Python alone, codistill's version, and a BERT vocabulary. Run it in the repository
# root, where there is a network; on that machine PYTHONPATH=src:.gpu/site.
#   sh benchmarks/carry.sh data/vocab/bert-base-uncased.txt
# torch, triton, transformers, tokenizers, numpy, pyarrow, pyyaml and rich are that machine's; pytest, pytest-xdist,
# pytest-timeout and hypothesis for the tests.
set -eu
mkdir -p .gpu
cp "$1" .gpu/vocab.txt
rm -rf .gpu/site
python3 -m pip install --quiet --no-compile --no-deps --target .gpu/site -c constraints.txt cyclopts docstring-parser rich-rst docutils attrs
python3 -m pip install --quiet --no-compile --no-deps --target .gpu/site .
rm -r .gpu/site/codistill build  # the code is that of src
