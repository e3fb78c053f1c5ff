#!/usr/bin/env bash
# Installs gkd_jax into .venv-quickstart and compares ways to train a student of
# 100 thousand parameters for g2p_cmudict from 3,000 labelled words: SFT, SFT for
# longer, sequence-level KD, supervised KD and on-policy GKD. Shows the runs while
# they train.
#   bash launch/quickstart.sh [SEED]       PYTHON=python3.12 chooses the Python
#   GKD=... runs an installed gkd instead of installing one
set -euo pipefail
cd "$(dirname "$0")/.."
seed=${1:-0}
out=$PWD/runs/quickstart-$seed
begin=$SECONDS

if [ -z "${GKD:-}" ]; then
  echo "installing gkd_jax into .venv-quickstart"
  "${PYTHON:-python3}" -m venv .venv-quickstart
  .venv-quickstart/bin/pip install --quiet ".[demo]"
  GKD=$PWD/.venv-quickstart/bin/gkd
fi
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} TF_CPP_MIN_LOG_LEVEL=3
# Huge pages for XLA's buffers: fewer page faults on a CPU, where glibc knows it.
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1
rm -rf "$out" && mkdir -p "$out" && cd "$out"
teacher=$($GKD path g2p_teacher 2>/dev/null)

$GKD watch sft=sft gkd=gkd sft_longer=sft_longer seqkd=seqkd \
  supervised_kd=supervised_kd &
watcher=$!
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
fail() { # log: shown once the watcher has left the terminal
  kill "$watcher" 2>/dev/null && sleep 1
  tail -n 20 "$1"
  return 1
}
run() { # name, further arguments
  name=$1
  shift
  $GKD train "$@" --gin.MODEL_DIR="'$out/$name'" --gin.SEED="$seed" \
    >"$name.log" 2>&1 || fail "$name.log"
}
more() { # name, gin file: continues from the SFT student
  run "$1" --gin_file="experiments/g2p/$2.gin" \
    --gin.INITIAL_CHECKPOINT_PATH="'$out/sft'"
}

run sft --gin_file=experiments/g2p/sft.gin &
first=$!
$GKD infer --gin_file=models/g2p.gin --gin_file=runs/infer.gin \
  --gin.STUDENT=%G2P_TEACHER --gin.CHECKPOINT_PATH="'$teacher'" \
  --gin.MIXTURE_OR_TASK_NAME="'g2p_cmudict_3k'" --gin.EVAL_SPLIT="'train'" \
  --gin.TASK_FEATURE_LENGTHS="{'inputs': 24, 'targets': 24}" \
  --gin.OUTPUT_PATH="'$out/teacher_outputs.jsonl'" >teacher_outputs.log 2>&1 ||
  fail teacher_outputs.log
export G2P_TEACHER_OUTPUTS=$out/teacher_outputs.jsonl
wait $first
# Two at a time: one core each.
more gkd gkd & first=$!
more sft_longer sft
more seqkd seqkd
more supervised_kd supervised_kd
wait $first
wait $watcher

echo
$GKD report --output_path="$out" teacher="$teacher" sft=sft \
  sft_longer=sft_longer seqkd=seqkd supervised_kd=supervised_kd gkd=gkd
echo "
picture     $(ls -1 "$out"/*.png | head -n 1)
page        $out/index.html
table       $out/table.txt, $out/results.json
checkpoint  $out/gkd
TensorBoard $out (tensorboard --logdir $out)
decoded     $out/gkd/examples.jsonl
$((SECONDS - begin)) seconds"
