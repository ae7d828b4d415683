#!/bin/sh
# The runs behind docs/models.md: 80 dev questions of five sets, by a model and, where their folders are given (the page needs
# them), its fine-tuned baselines. An hour on two cores with AVX512_BF16; goes on where it was stopped.
#   regrad-qdrant models gemma-3-270m
#   sh benchmarks/models.sh gemma-3-270m runs/gemma-3-270m-lora/initialization runs/gemma-3-270m-ft-direct/initialization \
#       runs/gemma-3-270m-ft-rag/initialization && python benchmarks/models_page.py
set -eu
name=$1 init=${2:-$1} ft_direct=${3:-} ft_rag=${4:-}
data=${DATA:-../shared/data}
out=benchmarks/results/models
mkdir -p "$out/$name" "$out/cost"

rivals=random,random/grounded,direct,rag${ft_direct:+,ft-direct}${ft_rag:+,ft-rag,ft-rag/grounded}
for set in ${SETS:-nq_open squad2_dev phantomwiki hotpotqa squadshifts_wiki}; do
    file=$out/$name/$set
    [ -f "$file.json" ] && continue
    regrad-qdrant eval --corpus "$data/$set/corpus.jsonl" --qa "$data/$set/qa.jsonl" --split dev --sample "${SAMPLE:-80}" \
        --init "$init" --dtype bfloat16 --batch 16 --against "$rivals" --modes "regrad,regrad/grounded,$rivals" \
        ${ft_direct:+--ft-direct "$ft_direct"} ${ft_rag:+--ft-rag "$ft_rag"} --resume "$file.part.jsonl" --json "$file.json"
    rm "$file.part.jsonl"
done

# What an atom and an answer take of each.
for of in smollm2-135m-instruct "$name"; do
    for part in "gradients --limit 32 --dtype float32" "query --rounds 8 --dtype bfloat16"; do
        file="$out/cost/${part%% *}-$of.json"
        [ "$of" = "$name" ] && asked=$init || asked=$of
        [ -f "$file" ] || regrad-qdrant bench $part --set "$data/squad2_dev" --init "$asked" --json "$file"
    done
done
