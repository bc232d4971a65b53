#!/usr/bin/env bash
# Trains on GPUs under SLURM, one process for each; jax lets them find each other.
#
#   sbatch launch/slurm.sh --config configs/mae_base.py --workdir DIR
#   sbatch --nodes=4 --gpus-per-node=4 --ntasks-per-node=4 launch/slurm.sh ...
#   launch/slurm.sh --dry_run ...     prints what the job would do
#
# DIR has to be one that every node sees. When time is nearly up, or the job preempted,
# training saves and exits with 75, and the job goes back to the queue to go on later; so
# it does with 134, when processes abort because another one was lost.
# PYTHON: the interpreter (python).
#
#SBATCH --job-name=hivit
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# Without B:, SIGTERM goes to the processes themselves. This script could not pass it on
# through srun, which makes a SIGKILL of it, nor tell it from a scancel, after which the
# job must not come back.
#SBATCH --signal=TERM@120

dry_run=
if [[ $1 == --dry_run ]]; then
  dry_run=1
  shift
elif [[ ! $SLURM_JOB_ID ]]; then
  echo "error: this is a job's script: sbatch $0 ..." >&2
  exit 2
fi

call() { # Prints a command as a shell reads it, and runs it.
  printf '%q ' "$@" && echo
  [[ $dry_run ]] || "$@"
}

# Every process sees all GPUs of its node, and jax takes the one of its SLURM_LOCALID.
# When the first ends, the others need time to save, or up to 2 x peer_timeout to abort;
# srun's exit code is the highest.
call srun --kill-on-bad-exit=0 --wait=150 \
  ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
  "${PYTHON:-python}" -m hivit_jax.main "$@"
code=$?

if [[ $dry_run || $code == 75 || $code == 134 ]]; then
  [[ ! $dry_run ]] || echo "# if that exits with 75 or 134:"
  call scontrol requeue "${SLURM_JOB_ID:-JOB}"
fi
exit "$code"
