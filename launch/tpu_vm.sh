#!/usr/bin/env bash
# Trains on a Cloud TPU slice that it asks for as a queued resource, and on another when a Spot slice is taken away.
#
#   export ZONE=us-west4-a TYPE=v5litepod-256 RUNTIME=v2-alpha-tpuv5-lite
#   export IMAGE=us-west4-docker.pkg.dev/PROJECT/REPOSITORY/aura-jax:1    # made of launch/Dockerfile
#   export SETUP='sudo mkdir -p /mnt/runs; mountpoint -q /mnt/runs || sudo mount -t nfs ADDRESS:/runs /mnt/runs'
#   launch/tpu_vm.sh NAME --config=FILE --workdir /mnt/runs/mine [flags of aura-jax train]
#
# Run it where it can stay (tmux on a small machine in the zone), with gcloud set up and `ssh-add
# ~/.ssh/google_compute_engine` done. SETUP runs on every host before training: it mounts what all hosts share below
# /mnt, which is all that the container sees of a host. SPOT= (empty) asks for a slice that is not preempted.
#
# 75 (saved) starts the run again always, 2 (a mistake of yours) never, a death up to AURA_JAX_RETRIES (3) times. SIGINT
# or SIGTERM to this script stops the run after saving. The slice stays until you delete it.
set -um # -m: Ctrl-C at the terminal does not reach gcloud
name=${1:?usage: launch/tpu_vm.sh NAME --config=FILE --workdir DIR}
shift
: "${ZONE:?}" "${TYPE:?}" "${RUNTIME:?}" "${IMAGE:?}" "${SETUP:=true}" "${SPOT=--spot}" "${POLL_SECONDS:=30}"
retries=${AURA_JAX_RETRIES:-3}
stopping=

say() { echo "launch/tpu_vm.sh: $*" >&2; }
queued() { gcloud compute tpus queued-resources "$1" "$name" --zone="$ZONE" "${@:2}"; }
on_hosts() { gcloud compute tpus tpu-vm ssh "$name" --zone="$ZONE" --worker="$1" --command="$2"; }

state() {
  local answer
  if answer=$(queued describe --format='value(state.state)' 2>&1); then
    echo "$answer"
  elif [[ $answer == *NOT_FOUND* ]]; then
    echo NONE
  else
    echo "UNKNOWN: $answer"
  fi
}

# Returns 0 when the slice is there.
wait_for_slice() {
  local now last=
  while [ -z "$stopping" ]; do
    now=$(state)
    [ "$now" = "$last" ] || say "$name is $now"
    last=$now
    case $now in
      ACTIVE) return 0 ;;
      NONE)
        queued create --node-id="$name" --accelerator-type="$TYPE" --runtime-version="$RUNTIME" ${SPOT:+"$SPOT"} ||
          return 1
        ;;
      SUSPENDED) # a slice that was taken away never comes back by itself
        queued delete --force --quiet || sleep "$POLL_SECONDS"
        ;;
      FAILED) return 1 ;;
      *) sleep "$POLL_SECONDS" ;;
    esac
  done
  return 75
}

# shellcheck disable=SC2329 # the trap calls it
stop() {
  stopping=1
  on_hosts 0 "sudo docker kill --signal=TERM aura-jax" # all hosts save when one is told to stop
}
trap stop TERM INT

# A container outlives the connection, and gcloud tries again when ssh fails: it then waits for the one that runs.
prepare="sudo docker stop aura-jax >/dev/null 2>&1; sudo docker rm aura-jax >/dev/null 2>&1; $SETUP"
run="sudo docker inspect aura-jax >/dev/null 2>&1 || sudo docker run --detach --name aura-jax --privileged --net=host \
  --stop-timeout=120 --volume=/mnt:/mnt --volume=/var/cache/aura_jax:/root/.cache/aura_jax \
  $IMAGE$(printf ' %q' "$@") >/dev/null || exit 125
code=\$(sudo docker wait aura-jax) || exit 125
[ \$code -eq 0 ] || sudo docker logs --tail=5 aura-jax
exit \$code"

deaths=0
while :; do
  wait_for_slice
  code=$?
  [ "$code" -eq 0 ] || break
  say "training; to watch: gcloud compute tpus tpu-vm ssh $name --zone=$ZONE --command='sudo docker logs -f aura-jax'"
  { on_hosts all "$prepare" && on_hosts all "$run"; } &
  pid=$!
  while kill -0 "$pid" 2>/dev/null; do
    if [ -n "$stopping" ]; then # the first signal may have come before there was a container, or a handler in it
      sleep "$POLL_SECONDS" &
      wait "$!"
      ! kill -0 "$pid" 2>/dev/null || stop
    else
      wait -n 2>/dev/null # a signal ends the wait, not the run
    fi
  done
  wait "$pid" 2>/dev/null
  code=$?
  if [ "$code" -eq 0 ] || [ "$code" -eq 2 ] || [ -n "$stopping" ]; then break; fi
  if [ "$code" -ne 75 ] && [ "$(state)" = ACTIVE ] && ((++deaths > retries)); then
    say "given up after $retries retries"
    break
  fi
  say "exit code $code: going on from the last checkpoint"
  sleep "$POLL_SECONDS"
done
say "exit code $code. If the slice is still there, it costs money until:"
say "gcloud compute tpus queued-resources delete $name --zone=$ZONE --force"
exit "$code"
