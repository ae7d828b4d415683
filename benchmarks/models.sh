#!/bin/sh
# The runs behind docs/models.md: the same dev questions as benchmarks/results.sh asks, by a larger model.
# An hour on two cores with AVX512_BF16; goes on where it was stopped.
#   regrad-qdrant models qwen2.5-coder-0.5b-instruct
#   sh benchmarks/models.sh && python benchmarks/models_page.py
set -eu
data=${DATA:-../shared/data}
init=${INIT:-qwen2.5-coder-0.5b-instruct}
out=benchmarks/results/models
mkdir -p "$out"

for set in ${SETS:-nq_open squad2_dev hotpotqa squadshifts_wiki phantomwiki}; do
    [ -f "$out/$set.json" ] && continue
    regrad-qdrant eval --corpus "$data/$set/corpus.jsonl" --qa "$data/$set/qa.jsonl" --split dev --sample "${SAMPLE:-80}" \
        --init "$init" --dtype bfloat16 --batch 16 --against random,random/grounded,direct,rag \
        --modes regrad,random,direct,regrad/grounded,random/grounded,rag \
        --resume "$out/$set.part.jsonl" --json "$out/$set.json"
    rm "$out/$set.part.jsonl"
done

# What an atom and an answer take of each.
mkdir -p "$out/cost"
for name in smollm2-135m-instruct "$init"; do
    for part in "gradients --limit 32" "query --rounds 8"; do
        file="$out/cost/${part%% *}-$name.json"
        [ -f "$file" ] || regrad-qdrant bench $part --set "$data/squad2_dev" --init "$name" --dtype bfloat16 --json "$file"
    done
done
