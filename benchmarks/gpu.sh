#!/bin/sh
# What wants a GPU, in one go: the tests there, the figures of speed, the sizes of real models, and the broad meta-training.
# Half an hour on an H100 with 80 GB. A part that is there already is not made again.
#   sh benchmarks/gpu.sh [FOLDER]
set -eu
out=${1:-runs/gpu}
mkdir -p "$out"
python -c 'import torch; print(torch.cuda.get_device_name())'

python -m pytest -q 2>&1 | tee "$out/tests.log"
[ -f "$out/speed.json" ] || regrad-qdrant bench speed --device cuda --json "$out/speed.json"
[ -f "$out/shapes.json" ] ||
    python benchmarks/shapes.py --shapes llama-3.2-1b,llama-3.2-3b,llama-3.1-8b --json "$out/shapes.json"
resume=
[ -f "$out/broad/checkpoint.pt" ] && resume=--resume
regrad-qdrant train --recipe loaders/recipes/smollm2-135m-instruct-broad.yaml --device cuda --dtype float32 --out "$out/broad" $resume
