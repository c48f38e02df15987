#!/usr/bin/env bash
# Runs COMMAND in the network namespace that $NAMESPACES names for this process, as a
# host of its own: with its own address, its own name, and no other host's loopback.
#   launch/local.sh N -- tests/namespace.sh COMMAND WORD...
set -euo pipefail
host=$NAMESPACES$JAX_PROCESS_ID
hosts=$(mktemp)
for ((i = 0; i < JAX_NUM_PROCESSES; i++)); do
  echo "10.77.0.$((i + 1)) $NAMESPACES$i"
done >"$hosts"
export JAX_COORDINATOR_ADDRESS=${NAMESPACES}0:${JAX_COORDINATOR_ADDRESS##*:}
# shellcheck disable=SC2016  # for the shell inside
exec ip netns exec "$host" unshare --uts --mount bash -c '
  hostname "$0" && mount --bind "$1" /etc/hosts && rm -f "$1" && shift && exec "$@"
' "$host" "$hosts" "$@"
