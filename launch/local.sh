#!/usr/bin/env bash
# Trains with N processes on this machine, each a host of the run, and goes on until the run is done.
#
#   launch/local.sh N --config=FILE --workdir DIR [flags of aura-jax train]
#
# To try several hosts on a machine without accelerators (JAX_NUM_CPU_DEVICES=2 gives each host two devices):
#
#   launch/local.sh 2 --config=configs/smoke.py --workdir runs/hosts
#
# With GPUs N is 1: one process drives all of a machine. Host 0 writes to the terminal, the others to files that are
# named if the run fails. When one dies, all are killed, and started again up to AURA_JAX_RETRIES (3) times; after 75
# (saved before a preemption) they are started again always, after 2 (a mistake of yours) never. SIGTERM or SIGINT to
# this script reaches every host: they save, and it ends with 75.
set -um # -m: each host in a process group of its own, which Ctrl-C at the terminal does not reach
hosts=${1:-}
if ! [[ $hosts =~ ^[1-9][0-9]*$ ]]; then
  echo "error: '$hosts' is no number of processes: launch/local.sh N --config=FILE --workdir DIR" >&2
  exit 2
fi
shift
here=$(cd "$(dirname "$0")" && pwd)
logs=$(mktemp -d "${TMPDIR:-/tmp}/aura-jax-hosts.XXXXXX")
retries=${AURA_JAX_RETRIES:-3}
pids=()
stopping=

say() { echo "launch/local.sh: $*" >&2; }

# shellcheck disable=SC2329 # the traps call it
forward() {
  stopping=1
  ((${#pids[@]})) && kill "-$1" "${pids[@]}" 2>/dev/null
}
trap 'forward TERM' TERM
trap 'forward INT' INT

kill_all() { # jax catches SIGTERM, so that a host which waits for a dead one ends by SIGKILL only
  kill -KILL -- "${pids[@]/#/-}" 2>/dev/null
}
trap kill_all EXIT

# Of the host that died and its exit code.
end_others() {
  (($1 == 0)) || tail -n 5 "$logs/host-$1.log" | sed "s/^/host $1: /" >&2
  ((hosts == 1)) || say "host $1 ended with exit code $2: the others are killed"
  kill_all
}

# Starts all hosts and waits for them. The run's exit code is the first that is not 0: what follows is its consequence.
attempt() {
  local port host code first=0
  port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])') || exit 1
  export AURA_JAX_COORDINATOR=127.0.0.1:$port AURA_JAX_HOSTS=$hosts
  AURA_JAX_HOST=0 "$here/run.sh" "$@" </dev/null &
  pids=($!)
  for ((host = 1; host < hosts; host++)); do
    AURA_JAX_HOST=$host "$here/run.sh" "$@" </dev/null >>"$logs/host-$host.log" 2>&1 &
    pids+=($!)
  done
  [ -z "$stopping" ] || forward TERM # it came while they were being started
  local running=("${!pids[@]}") # as indices, too
  while ((${#running[@]})); do
    for host in "${running[@]}"; do
      kill -0 "${pids[host]}" 2>/dev/null && continue
      wait "${pids[host]}" 2>/dev/null # bash would report there whom it killed
      code=$?
      unset "running[host]"
      if ((first == 0 && code != 0)); then
        first=$code
        ((code == 75)) || end_others "$host" "$code"
      fi
    done
    # Until one ends or a signal comes. What it returns is not asked: it leaves out who ended while another command ran.
    wait -n 2>/dev/null
  done
  kill_all # what hosts that ended left behind
  pids=()
  return "$first"
}

deaths=0
while :; do
  attempt "$@"
  code=$?
  if [ "$code" -eq 0 ] || [ "$code" -eq 2 ]; then break; fi
  if [ -n "$stopping" ]; then
    case $code in 130 | 143) code=75 ;; esac # stopped before it could note a signal: the same command goes on
    break
  fi
  if [ "$code" -ne 75 ] && ((++deaths > retries)); then
    say "given up after $retries retries"
    break
  fi
  say "exit code $code: going on from the last checkpoint"
done
if [ "$code" -eq 0 ] || [ "$code" -eq 75 ] || [ "$hosts" -eq 1 ]; then
  rm -r "$logs"
else
  say "the other hosts wrote to $logs"
fi
exit "$code"
