#!/usr/bin/env bash
# Trains on this machine, and goes on after an interruption until the run is done.
#
#   launch/local.sh CONFIG WORKDIR [--config.key=value ...]
#
# `aura-jax train` exits with 75 after SIGTERM or SIGINT saved a checkpoint; any other code ends the loop.
set -u
if [ $# -lt 2 ]; then
  echo "usage: $0 CONFIG WORKDIR [--config.key=value ...]" >&2
  exit 2
fi
config=$1 workdir=$2
shift 2
here=$(cd "$(dirname "$0")/.." && pwd)
aura_jax=$here/.venv/bin/aura-jax
[ -x "$aura_jax" ] || aura_jax=aura-jax
while :; do
  "$aura_jax" train --config="$config" --workdir "$workdir" "$@"
  code=$?
  [ "$code" -eq 75 ] || exit "$code"
  echo "interrupted after saving: resuming $workdir" >&2
  sleep 1
done
