#!/bin/sh
# The runs behind docs/results.md: every set of ../shared/data with a dev split, the modes side by side: of the default
# initialization in default/, fresh/, unseen/, other/, yesno/ and sentences/, elsewhere of the one that shipped before.
# Some hours on two cores. A run that is there already is not made again, and one that was stopped goes on.
#   sh benchmarks/results.sh && python benchmarks/results_page.py
set -eu
data=${DATA:-../shared/data} dtype=${DTYPE:-bfloat16}
mkdir -p runs benchmarks/results/passages benchmarks/results/grounded benchmarks/results/default benchmarks/results/fresh \
    benchmarks/results/unseen benchmarks/results/other benchmarks/results/yesno benchmarks/results/sentences

asked() { # NAME SET QUESTIONS OPTIONS…
    name=$1 set=$2 count=$3
    shift 3
    [ -f "benchmarks/results/$name.json" ] && return 0
    regrad-qdrant eval --corpus "$data/$set/corpus.jsonl" --qa "$data/$set/qa.jsonl" --split dev --sample "$count" \
        --init smollm2-135m-instruct-few "$@" --resume "$(answers "$name")" --json "benchmarks/results/$name.json"
    rm -f "$(answers "$name")"
}

answers() { # NAME: where they are kept as they are given
    echo "runs/results-$(echo "$1" | tr / -).jsonl"
}

run() { # NAME SET QUESTIONS OPTIONS…
    asked "$@" --modes direct,rag,regrad,random,raw,ft-direct --against random,raw,rag,direct,ft-direct
}

grounded() { # SET QUESTIONS: spans of the retrieved texts beside free answers
    asked "grounded/$1" "$1" "$2" --batch 4 --against regrad,random/grounded,ft-direct/grounded,ft-rag \
        --modes regrad,regrad/grounded,regrad/auto,random/grounded,ft-direct/grounded,ft-rag,ft-rag/grounded
}

passages() { # SET QUESTIONS: what is trained with the passages in the prompt
    asked "passages/$1" "$1" "$2" --modes regrad+icl,ft-rag --against ft-rag
}

# The default, in bfloat16, which processors with AVX512_BF16 multiply in half the time.
rivals=random,random/grounded,ft-direct,ft-direct/grounded,ft-rag

shipped() { # SET
    asked "default/$1" "$1" 160 --init smollm2-135m-instruct --dtype "$dtype" --batch 8 --against "regrad,$rivals,ft-rag/grounded" \
        --modes "regrad,regrad/grounded,regrad/auto,$rivals,ft-rag/grounded"
}

fresh() { # SET: questions of which none took part in a choice of τ, of an initialization or of a rate
    asked "fresh/$1" "$1" 120 --skip-sample 80 --skip-sample 160 --init smollm2-135m-instruct --dtype "$dtype" --batch 8 \
        --against "regrad,init,init/grounded,$rivals,ft-rag/grounded" \
        --modes "regrad,regrad/grounded,regrad/auto,init,init/grounded,$rivals,ft-rag/grounded"
}

unseen() { # SET: none of its texts was trained on
    asked "unseen/$1" "$1" 80 --init smollm2-135m-instruct --dtype "$dtype" --batch 8 --against "regrad,$rivals" \
        --modes "regrad,regrad/grounded,$rivals"
}

other() { # SET OPTIONS…: the other sets that people wrote, a share of whose train splits was trained on
    set=$1
    shift
    asked "other/$set" "$set" 160 --init smollm2-135m-instruct --dtype "$dtype" --batch 8 --against "regrad,$rivals" \
        --modes "regrad,regrad/grounded,regrad/auto,$rivals,ft-rag/grounded" "$@"
}

yesno() { # SET OPTIONS…: the likelier option, with spans or without
    set=$1
    shift
    asked "yesno/$set" "$set" 160 --init smollm2-135m-instruct --dtype "$dtype" --batch 8 --against random,ft-direct,ft-rag \
        --modes regrad,init,random,ft-direct,ft-rag "$@"
}

sentences() { # SET QUESTIONS OPTIONS…
    set=$1 count=$2
    shift 2
    asked "sentences/$set" "$set" "$count" --style sentence --init smollm2-135m-instruct --dtype "$dtype" --batch 8 \
        --against init,random,rag,ft-rag --modes regrad,init,random,direct,rag,ft-direct,ft-rag "$@"
}

among_three="--oracle --distractors 2" # for questions that name little of their text

for set in nq_open phantomwiki squad2_dev hotpotqa squadshifts_wiki; do shipped $set; done
for set in nq_open phantomwiki squad2_dev hotpotqa squadshifts_wiki; do fresh $set; done
for set in medquad timeqa tatqa onestopqa; do unseen $set; done
other 2wiki
other bioasq
for set in strategyqa fool_me_twice infotabs pubmedqa; do yesno $set; done
yesno housing_yesno --filter-field state
sentences fairytaleqa 80 $among_three
sentences squadshifts_wiki 160
for set in qamr ropes squadshifts_reddit; do other $set $among_three; done
other wikitablequestions
[ -f benchmarks/merge.json ] || regrad-qdrant bench merge --init smollm2-135m-instruct-few --set facts --set "$data/phantomwiki:direct" --limit 60 \
    --noise 3 --json benchmarks/merge.json
run squad2_dev squad2_dev 160
run nq_open nq_open 80
run phantomwiki phantomwiki 80
run hotpotqa hotpotqa 80
for set in nq_open phantomwiki hotpotqa squad2_dev; do passages $set 160; done
for set in nq_open phantomwiki hotpotqa squad2_dev squadshifts_wiki; do grounded $set 80; done
run phantomwiki-direct phantomwiki 60 --type direct
run 2wiki 2wiki 30
run bioasq bioasq 30
run housing_yesno housing_yesno 30 --filter-field state
run pubmedqa pubmedqa 30
