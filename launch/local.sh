#!/usr/bin/env bash
# Starts N processes of one run on this machine, which jax.distributed joins.
#   launch/local.sh [--dry-run] N -- --config=configs/mae.py:digits --workdir=runs/two
#   launch/local.sh [--dry-run] N -- COMMAND WORD...
# SIGTERM and Ctrl-C ask all processes to save and leave; a second one kills them. If one
# process fails, the others have GRACE seconds. The exit code is the first that is not 0.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
read_arguments "$@"
need_arguments
[[ ${#WORDS[@]} == 1 && ${WORDS[0]} =~ ^[1-9][0-9]*$ ]] ||
  fail "'${WORDS[*]}': want the number of processes: [--dry-run] N -- ..."
if [[ ${ARGS[0]} == --* ]]; then
  ARGS=("$PYTHON" -m mim_jax.main --distributed "${ARGS[@]}")
fi

free='import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])'
port=$("$PYTHON" -c "$free")
pids=() asked=0 code=0
all() { # kills with that option; a group is a process and its workers
  local pid
  for pid in "${pids[@]}"; do kill "$1" -- "$2$pid" 2>/dev/null || true; done
}
# shellcheck disable=SC2329  # the trap calls it
ask() {
  if ((asked++)); then all -KILL -; else all -TERM ''; fi
}
trap ask TERM INT
trap 'all -KILL -' EXIT

{ # bash reads the braces to their end first: this file may change meanwhile
for ((i = 0; i < WORDS[0]; i++)); do
  # Each in a session of its own, so that Ctrl-C reaches this script only.
  command=(env "JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}" JAX_COORDINATOR_ADDRESS="localhost:$port"
    JAX_NUM_PROCESSES="${WORDS[0]}" JAX_PROCESS_ID="$i" setsid "${ARGS[@]}")
  if [[ $DRY ]]; then run "${command[@]}"; else "${command[@]}" & pids+=($!); fi
done
# Asks each process. `wait -n` forgets the second of two that are killed together.
while ((${#pids[@]})); do
  left=()
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then left+=("$pid") && continue; fi
    status=0
    wait "$pid" || status=$?
    if ((status && !code)); then
      code=$status
      { sleep "${GRACE:-15}" && all -KILL -; } >/dev/null 2>&1 3>&- &
      reaper=$!
    fi
  done
  pids=("${left[@]}")
  if ((${#pids[@]})); then sleep 0.2 & wait $! || true; fi # a signal ends the wait
done
if [[ ${reaper-} ]]; then kill "$reaper" 2>/dev/null || true; fi
exit "$code"
}
