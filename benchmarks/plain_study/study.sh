#!/usr/bin/env bash
# The study as a shell loop: one process trains a run, the next one scores it.
#   study.sh PYTHON MIRROR ROWS.json OUT "METHODS" "RANKS" "SEEDS" TASKS LIMIT DTYPE BATCH
set -euo pipefail
here="$(dirname "$0")"
python="$1" mirror="$2" rows="$3" out="$4" methods="$5" ranks="$6" seeds="$7" tasks="$8" limit="$9" dtype="${10}" batch="${11}"
model="$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["model"])' "$rows")"
for method in $methods; do
    for rank in $ranks; do
        for seed in $seeds; do
            run="$out/$method-r$rank-s$seed"
            mkdir -p "$run"
            "$python" "$here/train.py" "$rows" "$method" "$rank" "$seed" "$run"
            "$python" "$here/lm_eval_offline.py" "$mirror" run --model hf \
                --model_args "pretrained=$model,dtype=$dtype,peft=$run/adapter" --tasks "$tasks" --num_fewshot 5 \
                --limit "$limit" --batch_size "$batch" --output_path "$run/lm_eval"
        done
    done
done
