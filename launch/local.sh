#!/usr/bin/env bash
# Several processes on one machine; for trying out what many hosts do.
#   PROCESSES=4 bash launch/local.sh --gin_file=my_run.gin --gin.MODEL_DIR=\"/runs/a\"
#   DRY_RUN=1 prints the commands and runs none
set -euo pipefail
n=${PROCESSES:-2} port=${PORT:-7654}
for ((i = 0; i < n; i++)); do
  command=("${GKD:-gkd}" train "$@" "--coordinator_address=localhost:$port"
    "--process_count=$n" "--process_index=$i")
  if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "${command[@]}" && echo
  else
    "${command[@]}" &
    pids+=($!)
  fi
done
[ -n "${DRY_RUN:-}" ] && exit
trap 'kill "${pids[@]}" 2>/dev/null || true' TERM INT
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status
