#!/usr/bin/env bash
# Trains on a Cloud TPU: a single VM or a pod of many.
#
#   launch/tpu_vm.sh COMMAND [FLAG...] [-- FLAG of hivit_jax.main...]
#
#   create   request the TPU as a queued resource and wait until it is ready
#   setup    copy the checkout to every VM and install it
#   run      train on every VM, as long as this terminal is connected
#   resume   recreate the TPU unless it is ready, set it up, and run
#   keep     repeat resume until training finishes, must not be retried, or has failed
#            five times in a row
#   status   print the state of the request and of the TPU
#   delete   delete the TPU
#
# flag        environment   default               meaning
# --name      TPU_NAME      hivit                 name of the TPU and of the request
# --type      TPU_TYPE      v5litepod-4           accelerator type
# --version   TPU_VERSION   v2-alpha-tpuv5-lite   VM image
# --zone      TPU_ZONE      gcloud's              zone of the TPU
# --project   TPU_PROJECT   gcloud's              project that pays for the TPU
# --source    TPU_SOURCE    that of this script   checkout to copy
# --spot      TPU_SPOT=1    off                   cheaper, but may be preempted at any time
# --dry_run                 off                   print the commands instead of running them
#
# TPU_PAUSE: seconds between two queries of the queue, and before a retry; 30 by default.

name=${TPU_NAME:-hivit}
type=${TPU_TYPE:-v5litepod-4}
version=${TPU_VERSION:-v2-alpha-tpuv5-lite}
zone=$TPU_ZONE
project=$TPU_PROJECT
source=${TPU_SOURCE:-$(dirname "$0")/..}
spot=$TPU_SPOT
pause=${TPU_PAUSE:-30}
dry_run=
lost= # 1: recreate the TPU even if it is ready

# Runs on every VM. uv installs Python 3.11, because the Python of the VM images may be
# older. Some images permit pip to install uv only with PIP_BREAK_SYSTEM_PACKAGES.
INSTALL="mkdir -p hivit_jax && cd hivit_jax && tar -xzf ../hivit_jax.tgz && \
PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv && \
python3 -m uv venv --quiet --allow-existing --python 3.11 .venv && \
python3 -m uv pip install --quiet --python .venv --constraint requirements.lock \
--editable '.[data,tpu]'"

# gcloud reconnects when a connection breaks, and the earlier training process may then
# still hold the TPU. A first SIGTERM makes the earlier process save. A second SIGTERM, a
# minute later, kills it.
STOP_OLD_RUN="while pkill -f '^[^ ]*python -m hivit_jax'; do sleep 60; done;"

fail() {
  printf 'error: %s\n' "$@" >&2
  exit 2
}

call() { # Prints a command, quoted for a shell; runs it unless --dry_run.
  if [[ $dry_run ]]; then
    printf '%q ' "$@" && echo
  else
    { printf '%q ' "$@" && echo; } >&2
    "$@"
  fi
}

tpus() { # GROUP VERB ARGUMENT...
  call gcloud compute tpus "$@" \
    ${zone:+--zone="$zone"} ${project:+--project="$project"} --quiet
}

everywhere() { # Runs a shell command on every VM.
  tpus tpu-vm ssh "$name" --worker=all --command="$1"
}

queue_state() { tpus queued-resources describe "$name" --format='value(state.state)'; }
tpu_state() { tpus tpu-vm describe "$name" --format='value(state)'; }

is_ready() {
  if [[ $dry_run ]]; then
    tpu_state
    echo "# only if the state is not READY:"
    return 1
  fi
  [[ $(tpu_state 2> /dev/null) == READY ]]
}

create() {
  local state
  tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$type" \
    --runtime-version="$version" ${spot:+--spot} || return
  if [[ $dry_run ]]; then
    echo "until [[ \$($(queue_state)) == ACTIVE ]]; do sleep $pause; done"
    return
  fi
  until state=$(queue_state 2> /dev/null) && [[ $state == ACTIVE ]]; do
    echo "$name: ${state:-no answer}" >&2
    case $state in FAILED | SUSPEND* | DELETING) return 1 ;; esac
    sleep "$pause"
  done
}

setup() {
  local archive=${TMPDIR:-/tmp}/$name.tgz
  call tar -C "$source" -czf "$archive" hivit_jax configs \
    README.md pyproject.toml requirements.lock setup.cfg ||
    fail "--source=$source: expected a checkout of hivit_jax that tar can read"
  tpus tpu-vm scp "$archive" "$name:hivit_jax.tgz" --worker=all &&
    everywhere "$INSTALL"
}

run() {
  # With "exit", training is a child of the remote shell, and ssh returns the shell's
  # code, which is 134 for an abort. Without "exit", the shell would be replaced by
  # training, and ssh would return 255 if a signal ended training.
  everywhere "cd hivit_jax && $STOP_OLD_RUN \
.venv/bin/python -m hivit_jax.main$(printf ' %q' "$@"); exit \$?"
}

prepare() { # Makes sure that a TPU is ready and set up.
  if [[ $lost ]] || ! is_ready; then
    delete
    create || return
    lost=
  fi
  setup
}

resume() { prepare && run "$@"; }

keep() {
  local code=1 failures=0
  trap 'exit 130' INT
  trap 'exit 143' TERM
  while true; do
    if prepare; then
      run "$@" && code=0 || code=$?
      [[ $dry_run ]] && return
      case $code in
        0 | 2 | 3 | 4 | 5) break ;; # 0: finished; others: a retry would fail again
        75 | 134) failures=-1 ;;    # 75: interrupted and saved; 134: lost a process
        255) lost=1 ;;              # the TPU cannot be reached
      esac
      is_ready || failures=-1 # a preemption does not count as a failure
    else
      code=1 lost=1
    fi
    ((++failures < 5)) || break
    echo "$name: exit code $code; retrying in $pause seconds" >&2
    sleep "$pause"
  done
  echo "$name: exit code $code; the TPU may still exist; 'delete' deletes it" >&2
  return "$code"
}

delete() { tpus queued-resources delete "$name" --force; }

status() {
  queue_state
  tpu_state
}

command=$1
shift
while (($#)); do
  case $1 in
    --) break ;;
    --*=*)
      set -- "${1%%=*}" "${1#*=}" "${@:2}"
      continue
      ;;
    --spot | --dry_run) declare "${1#--}=1" ;;
    --name | --type | --version | --zone | --project | --source)
      (($# > 1)) || fail "$1 needs a value"
      declare "${1#--}=$2"
      shift
      ;;
    *) fail "unknown flag $1; training flags go after --" ;;
  esac
  shift
done

case $command in
  create | setup | status | delete) (($# == 0)) || fail "$command accepts no training flags" ;;
  run | resume | keep)
    (($# > 1)) || fail "$command needs training flags: -- --config=NAME --workdir=gs://..."
    shift
    [[ $command == run || " $*" == *" --workdir"[\ =]gs://* ]] ||
      fail "expected --workdir=gs://BUCKET/DIRECTORY, because deleting a TPU deletes its disk"
    ;;
  *)
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
[[ $dry_run ]] || type gcloud > /dev/null || fail "gcloud is not installed"
"$command" "$@"
