#!/usr/bin/env bash
# What every host of a run executes, whoever starts it: `aura-jax train`, on this host once.
#
#   launch/run.sh --config=FILE --workdir DIR [flags of aura-jax train]
#
# Exit codes: 0 all steps done; 2 a mistake of the user; 75 stopped after saving. After 75, and after any other code,
# the same command on all hosts goes on from the last checkpoint. Under srun 2 becomes 254: srun reports the highest
# code of its tasks, and a mistake has to outweigh the 137 of the peers that are killed for it.
set -u
command -v aura-jax >/dev/null || PATH=$(cd "$(dirname "$0")/.." && pwd)/.venv/bin:$PATH
if [ -z "${SLURM_PROCID:-}" ]; then
  exec aura-jax train "$@" # in a container it is then the process that gets SIGTERM
fi
trap : TERM INT # Slurm signals this shell as well, which has to wait for what the run says
aura-jax train "$@"
code=$?
[ "$code" -ne 2 ] || code=254
exit "$code"
