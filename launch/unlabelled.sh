#!/usr/bin/env bash
# After launch/quickstart.sh with the same SEED: trains its SFT student on words
# without labels. On-policy GKD needs the words alone; SeqKD and supervised KD
# train on the teacher's greedy outputs for the same words.
#   bash launch/unlabelled.sh [SEED]
set -euo pipefail
cd "$(dirname "$0")/.."
seed=${1:-0}
start=$PWD/runs/quickstart-$seed/sft
out=$PWD/runs/unlabelled-$seed
GKD=${GKD:-$PWD/.venv-quickstart/bin/gkd}
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} TF_CPP_MIN_LOG_LEVEL=3
# Huge pages for XLA's buffers: a third less time on a CPU, where glibc knows it.
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1
rm -rf "$out" && mkdir -p "$out" && cd "$out"
teacher=$($GKD path g2p_teacher 2>/dev/null)

run() { # name, gin file, task
  echo "$1: training"
  $GKD train --gin_file="experiments/g2p/$2.gin" --gin.SEED="$seed" \
    --gin.MIXTURE_OR_TASK_NAME="'$3'" --gin.MODEL_DIR="'$out/$1'" \
    --gin.INITIAL_CHECKPOINT_PATH="'$start'" >"$1.log" 2>&1 ||
    { tail -n 20 "$1.log"; return 1; }
}

run gkd gkd g2p_cmudict_unlabelled & first=$!
$GKD infer --gin_file=models/g2p.gin --gin_file=runs/infer.gin \
  --gin.STUDENT=%G2P_TEACHER --gin.CHECKPOINT_PATH="'$teacher'" \
  --gin.MIXTURE_OR_TASK_NAME="'g2p_cmudict_unlabelled'" \
  --gin.EVAL_SPLIT="'train'" \
  --gin.TASK_FEATURE_LENGTHS="{'inputs': 24, 'targets': 24}" \
  --gin.OUTPUT_PATH="'$out/teacher_outputs.jsonl'" >teacher_outputs.log 2>&1 ||
  { tail -n 20 teacher_outputs.log; exit 1; }
export G2P_TEACHER_OUTPUTS=$out/teacher_outputs.jsonl
run seqkd seqkd g2p_cmudict_unlabelled_teacher
wait $first
run supervised_kd supervised_kd g2p_cmudict_unlabelled_teacher

$GKD report --output_path="$out" teacher="$teacher" sft="$start" \
  seqkd=seqkd supervised_kd=supervised_kd gkd=gkd
