#!/usr/bin/env bash
# Trains on a Cloud TPU, from a single VM to a pod of many.
#
#   launch/tpu_vm.sh COMMAND [FLAG...] [-- FLAG of hivit_jax.main...]
#
#   create   ask for the TPU, in Google's queue, and wait until it is there
#   setup    copy this checkout to every VM of it and install it there
#   run      train on every VM, as long as this terminal is connected
#   resume   run; first a TPU that is not there is made again, and set up
#   keep     resume until training has finished, or cannot
#   status   of the request in the queue, and of the TPU
#   delete   give it back
#
# flag          environment    value
# --name        TPU_NAME       hivit
# --type        TPU_TYPE       v5litepod-4
# --version     TPU_VERSION    of the VM's image: v2-alpha-tpuv5-lite
# --zone        TPU_ZONE       gcloud's
# --project     TPU_PROJECT    gcloud's
# --source      TPU_SOURCE     the checkout to run: the one this script is in
# --spot        TPU_SPOT=1     cheaper; Google may take it back at any time
# --dry_run                    print every command instead of running it
#
# TPU_PAUSE: seconds (30) between two looks at the queue, and before trying again.

name=${TPU_NAME:-hivit}
type=${TPU_TYPE:-v5litepod-4}
version=${TPU_VERSION:-v2-alpha-tpuv5-lite}
zone=$TPU_ZONE
project=$TPU_PROJECT
source=${TPU_SOURCE:-$(dirname "$0")/..}
spot=$TPU_SPOT
pause=${TPU_PAUSE:-30}
dry_run=
lost= # is it to be made again, whatever its state says?

# On every VM. The images' own Python is older, or one that pip may not install into.
INSTALL="mkdir -p hivit_jax && cd hivit_jax && tar -xzf ../hivit_jax.tgz && \
PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv && \
python3 -m uv venv --quiet --allow-existing --python 3.11 .venv && \
python3 -m uv pip install --quiet --python .venv --constraint requirements.lock \
--editable '.[data,tpu]'"

# gcloud reconnects when a connection breaks, and what it had started may still hold the
# TPU: that is asked to save, and killed a minute later.
MAKE_WAY="cd hivit_jax && \
while pkill -f '^[^ ]*python -m hivit_jax'; do sleep 60; done;"

fail() {
  printf 'error: %s\n' "$@" >&2
  exit 2
}

call() { # Prints a command as a shell reads it, and runs it.
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

everywhere() { # A line for the shell of every VM.
  tpus tpu-vm ssh "$name" --worker=all --command="$1"
}

queue_state() { tpus queued-resources describe "$name" --format='value(state.state)'; }
tpu_state() { tpus tpu-vm describe "$name" --format='value(state)'; }

there() {
  if [[ $dry_run ]]; then
    tpu_state
    echo "# unless that is READY:"
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
    fail "--source=$source is no checkout that can be packed"
  tpus tpu-vm scp "$archive" "$name:hivit_jax.tgz" --worker=all &&
    everywhere "$INSTALL"
}

run() {
  # The shell stays, because ssh returns 255 for a command that a signal ends, and the
  # shell returns 134 for an abort.
  everywhere "$MAKE_WAY .venv/bin/python -m hivit_jax.main$(printf ' %q' "$@"); exit \$?"
}

prepare() { # A TPU that is there and set up.
  if [[ $lost ]] || ! there; then
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
        0 | 2 | 3 | 4 | 5) break ;; # finished, or the next try would end as this one
        75 | 134) failures=-1 ;;    # saved, or another process was lost
        255) lost=1 ;;              # it cannot be reached
      esac
      there || failures=-1 # taken back while training: no fault of anyone
    else
      code=1 lost=1
    fi
    ((++failures < 5)) || break
    echo "$name: exit code $code; trying again in $pause seconds" >&2
    sleep "$pause"
  done
  echo "$name: exit code $code; the TPU is still there: 'delete' gives it back" >&2
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
    *) fail "unknown flag $1; training's own come after --" ;;
  esac
  shift
done

case $command in
  create | setup | status | delete) (($# == 0)) || fail "$command runs no training" ;;
  run | resume | keep)
    (($# > 1)) || fail "$command what? -- --config=configs/NAME.py --workdir=gs://..."
    shift
    [[ $command == run || " $*" == *" --workdir"[\ =]gs://* ]] ||
      fail "what is on a TPU is lost with it: --workdir=gs://BUCKET/DIRECTORY"
    ;;
  *)
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
[[ $dry_run ]] || type gcloud > /dev/null || fail "gcloud is not installed"
"$command" "$@"
