#!/usr/bin/env bash
# Trains on GPUs under SLURM, with one process for each GPU. The processes find each other
# through SLURM's environment variables.
#
#   sbatch launch/slurm.sh --config configs/mae_base.py --workdir DIR
#   sbatch --nodes=4 --gpus-per-node=4 --ntasks-per-node=4 launch/slurm.sh ...
#   launch/slurm.sh --dry_run ...     print the commands of the job
#
# DIR must be visible from every node. Shortly before the time limit, or when the job is
# preempted, training saves and exits with 75. The job is then requeued and resumes. It is
# also requeued after exit code 134 (processes aborted because another one was lost).
# PYTHON: the interpreter; python by default.
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
# Without "B:", SLURM sends SIGTERM to the training processes. With "B:", SLURM would send
# SIGTERM to this script. The script could not forward the signal, because srun turns
# SIGTERM into SIGKILL. It also could not distinguish the time limit from scancel, after
# which the job must not be requeued.
#SBATCH --signal=TERM@120

if [[ $1 == --help || $1 == -h ]]; then
  awk 'NR > 1 && !/^#( |$)/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0"
  exit
fi

dry_run=
if [[ $1 == --dry_run ]]; then
  dry_run=1
  shift
elif [[ ! $SLURM_JOB_ID ]]; then
  echo "error: no SLURM job; submit this script: sbatch $0 ..." >&2
  exit 2
fi

call() { # Prints a command, quoted for a shell, and runs it.
  printf '%q ' "$@" && echo
  [[ $dry_run ]] || "$@"
}

# Every process sees all GPUs of its node, and JAX uses GPU number SLURM_LOCALID.
# --wait: after the first process ends, the others need time to save, or up to
# 2 x peer_timeout seconds to abort. srun returns the highest exit code.
call srun --kill-on-bad-exit=0 --wait=150 \
  ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
  "${PYTHON:-python}" -m hivit_jax.main "$@"
code=$?

if [[ $dry_run || $code == 75 || $code == 134 ]]; then
  [[ ! $dry_run ]] || echo "# if that exits with 75 or 134:"
  call scontrol requeue "${SLURM_JOB_ID:-JOB}"
fi
exit "$code"
