#!/bin/sh
# The step on a GPU, in under 10 minutes: 12 and 6 layers x 768, 128 tokens, 30 % predicted, bfloat16, the mutual step beside
# the loops that people write; the weak-teacher step beside the student alone; what `train --plan` says of its memory.
# Run it in the repository root after `sh benchmarks/carry.sh VOCABULARY`; results go to $OUT if that is set.
#   DEVICE=cpu LAYERS=2 WIDTH=64 SEQUENCES=4 RUNS=1 sh benchmarks/step/gpu.sh   tries the script itself without a GPU.
# How it grows with size, members, rows and vocabulary: python3 benchmarks/scaling/run.py --device cuda --out FILE
set -eu
export PYTHONPATH="src:${PYTHONPATH:-}:.gpu/site"
device=${DEVICE:-cuda} layers=${LAYERS:-12} width=${WIDTH:-768} sequences=${SEQUENCES:-128} runs=${RUNS:-9}
out=${OUT:-benchmarks/step}
codistill() { python3 -c 'from codistill.cli import main; main()' "$@"; }
large="model.family=modernbert model.layers=$layers model.width=$width"
small="model.family=modernbert model.layers=$((layers / 2)) model.width=$width"
common="data.tokenizer=.gpu/vocab.txt data.length=128 batch.sequences=$sequences precision=bfloat16"
settings() {
    for setting in $common; do printf -- '--set %s ' "$setting"; done
    for setting in $large; do printf -- '--set members.large.%s ' "$setting"; done
}
of_small() { for setting in $small; do printf -- '--set members.%s.%s ' "$1" "$setting"; done; }
codistill train ctcd:tiny $(settings) $(of_small small) --plan --device "$device"
codistill bench step ctcd:tiny $(settings) $(of_small small) --device "$device" --runs "$runs" --out "$out/gpu-ctcd.json"
codistill bench step standalone:tiny $(settings) --device "$device" --runs "$runs" --out "$out/gpu-alone.json" \
    --provider ours --provider "ours, compiled" --provider plain
codistill bench step dwt:tiny $(settings) --set members.weak.path=null $(of_small weak) --device "$device" --runs "$runs" \
    --out "$out/gpu-dwt.json" --provider ours --provider "ours, compiled"
