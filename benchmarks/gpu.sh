#!/bin/sh
# What wants a GPU, in one go: the figures of speed, the sizes of real models, the broad meta-training, and the tests there.
# A figure that is there already is not made again, and a training that was stopped goes on.
#   sh benchmarks/gpu.sh [FOLDER]
set -eu
out=${1:-runs/gpu}
mkdir -p "$out"
python -c 'import torch; print(torch.cuda.get_device_name())'

[ -f "$out/speed.json" ] || regrad-qdrant bench speed --device cuda --json "$out/speed.json"
[ -f "$out/shapes.json" ] ||
    python benchmarks/shapes.py --shapes llama-3.2-1b,llama-3.2-3b,llama-3.1-8b --json "$out/shapes.json"
resume=
[ -f "$out/broad/checkpoint.pt" ] && resume=--resume
regrad-qdrant train --recipe loaders/recipes/smollm2-135m-instruct-broad.yaml --device cuda --dtype float32 --out "$out/broad" $resume
python -m pytest -q # last: nothing else is lost where one fails
