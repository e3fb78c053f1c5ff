#!/usr/bin/env bash
# The same command on all workers of a TPU VM pod, with gcloud. They need the
# package (INSTALL=1 installs it) and a MODEL_DIR that all of them see (gs://).
#   TPU=name ZONE=us-central2-b bash launch/tpu_vm.sh --gin_file=... --gin.X=...
#   DRY_RUN=1 prints the commands and runs none
set -euo pipefail
: "${TPU:?set TPU to the name of the pod}" "${ZONE:?set ZONE}"
on_all() {
  local command=(gcloud compute tpus tpu-vm ssh "$TPU" "--zone=$ZONE"
    --worker=all "--command=$1")
  if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "${command[@]}" && echo; else "${command[@]}"; fi
}
[ -z "${INSTALL:-}" ] || on_all "pip install -q '${PACKAGE:-gkd_jax[tpu]}'"
on_all "$(printf '%q ' "${GKD:-gkd}" train --multiprocess "$@")"
