#!/usr/bin/env bash
# Starts the command on all hosts under tmux; leaves a command alone that runs already. If
# that is another one, the exit code is 3.
#   launch/run.sh [--dry-run] -- --config=configs/mae.py --workdir=bucket/runs/mae
# Its output goes to ~/mim_jax/log.txt, its exit code in the end to ~/mim_jax/exit-code.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
read_arguments "$@"
no_words
need_arguments
need_settings PROJECT

other="another command runs here:"
command=$(quoted .venv/bin/python -m mim_jax.main --distributed "${ARGS[@]}")
cache=$(quoted "${COMPILED-}")
# A host that shuts down signals all its processes. This shell must outlive the run, which
# saves first, and write its exit code.
inside=$(quoted bash -c "trap '' HUP; trap : TERM
export JAX_COMPILATION_CACHE_DIR=$cache
$command >>log.txt 2>&1; echo \$? >exit-code")
said=$(on_hosts "cd mim_jax || exit
if tmux has-session -t =mim 2>/dev/null; then
  if [ \"\$(cat command)\" = $(quoted "$command") ]
  then echo running already: \"\$(cat command)\"
  else echo $other \"\$(cat command)\"
  fi
  exit
fi
rm -f exit-code; printf '%s\\n' $(quoted "$command") >command
tmux new-session -d -s mim $inside")
if [[ $said ]]; then printf '%s\n' "$said"; fi
if [[ $said == *"$other"* ]]; then
  say "this command was not started: want the end of that one, or a TPU of another NAME"
  exit 3
fi
