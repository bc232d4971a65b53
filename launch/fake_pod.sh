#!/usr/bin/env bash
# Simulates a pod: runs one command as several processes on the CPU of this machine.
#
#   launch/fake_pod.sh -n 4 -- --config configs/digits_mae.py --workdir runs/pod
#
# Every line of output starts with the number of the process, such as [2]. SIGTERM and
# Ctrl-C are forwarded to all processes. The exit code is the code of the first process
# that fails. Codes 75 (interrupted, saved) and 134 (another process was lost) are returned
# only if no process fails with another code. After a failure, the script waits GRACE
# seconds and then kills the remaining processes.
#
# GRACE: 150 by default, which is more than 2 x peer_timeout.
# PYTHON: the interpreter; python by default.

if [[ $1 == --help || $1 == -h ]]; then
  awk 'NR > 1 && !/^#( |$)/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0"
  exit
fi

if [[ $1 != -n || ! $2 =~ ^[1-9][0-9]*$ || $3 != -- ]]; then
  echo "usage: $0 -n COUNT -- FLAG of hivit_jax.main..." >&2
  exit 2
fi
count=$2
shift 3
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}

# Picks a port without a listener, below the range of outgoing connections.
until port=$((10000 + RANDOM % 20000)) &&
  ! (: < "/dev/tcp/localhost/$port") 2> /dev/null; do :; done

prefix() { # Prints "[$1] " before every line.
  trap '' INT TERM
  while IFS= read -r line || [[ $line ]]; do printf '[%s] %s\n' "$1" "$line"; done
}

stop() { # Signals all started processes, and records the signal for the others.
  signal=$1
  ((${#pids[@]} == 0)) || kill "-$1" "${pids[@]}"
}
pids=() signal=
trap 'stop INT' INT
trap 'stop TERM' TERM HUP

set -m # one process group per process, so that Ctrl-C reaches only this script
for ((i = 0; i < count; i++)); do
  "${PYTHON:-python}" -m hivit_jax.main "$@" --coordinator_address="localhost:$port" \
    --num_processes="$count" --process_id="$i" < /dev/null > >(prefix "$i") 2>&1 &
  pids[i]=$!
done
set +m
[[ ! $signal ]] || stop "$signal"

code=0
while ((${#pids[@]})); do
  sleep 0.1
  for i in "${!pids[@]}"; do
    kill -0 "${pids[i]}" 2> /dev/null && continue
    wait "${pids[i]}"
    status=$?
    unset "pids[i]"
    ((status)) || continue
    echo "[$i] exit code $status" >&2
    case $code in 0 | 75 | 134) code=$status ;; esac
    deadline=${deadline:-$((SECONDS + ${GRACE:-150}))}
  done
  [[ $deadline ]] && ((SECONDS >= deadline && ${#pids[@]})) && kill -KILL "${pids[@]}"
done
exit "$code"
