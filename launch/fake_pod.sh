#!/usr/bin/env bash
# Rehearses a pod: one command as several processes of this machine, on its CPU.
#
#   launch/fake_pod.sh -n 4 -- --config configs/digits_mae.py --workdir runs/pod
#
# Every line of output begins with its process, as in [2]. SIGTERM and Ctrl-C are passed
# on to all. The exit code is that of the first process to fail; 75, saved, or 134, lost
# another process, only if none did worse. After a failure the others have GRACE seconds
# (150, more than 2 x peer_timeout) before they are killed.
# PYTHON: the interpreter (python).

if [[ $1 != -n || ! $2 =~ ^[1-9][0-9]*$ || $3 != -- ]]; then
  echo "usage: $0 -n COUNT -- FLAG of hivit_jax.main..." >&2
  exit 2
fi
count=$2
shift 3
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}

# A port that nobody answers on, below those that outgoing connections get.
until port=$((10000 + RANDOM % 20000)) &&
  ! (: < "/dev/tcp/localhost/$port") 2> /dev/null; do :; done

prefix() { # Puts "[$1] " before every line.
  trap '' INT TERM
  while IFS= read -r line || [[ $line ]]; do printf '[%s] %s\n' "$1" "$line"; done
}

stop() { # A signal to all; those that are yet to start get it then.
  signal=$1
  ((${#pids[@]} == 0)) || kill "-$1" "${pids[@]}"
}
pids=() signal=
trap 'stop INT' INT
trap 'stop TERM' TERM HUP

set -m # a group for each process: from a terminal, Ctrl-C comes here alone
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
