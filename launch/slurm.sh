#!/usr/bin/env bash
# SLURM with GPUs: one process for each GPU; JAX finds the others by SLURM's
# variables. SIGTERM comes two minutes before the time is up: the run saves, ends
# with status 143, and is queued again.
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 launch/slurm.sh --gin_file=...
#   DRY_RUN=1 bash launch/slurm.sh ... prints the command and runs none
#SBATCH --job-name=gkd
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
set -euo pipefail
command=(srun --kill-on-bad-exit=0 "${GKD:-gkd}" train --multiprocess "$@")
if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "${command[@]}" && echo && exit; fi
status=0
"${command[@]}" || status=$?
if [ $status -eq 143 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $status
