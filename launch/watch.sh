#!/usr/bin/env bash
# Creates the TPU, sets it up and runs the command until the run is done. The same command
# goes on after a preemption, after exit code 75 and after the loss of a host.
#   launch/watch.sh [--dry-run] -- --config=configs/mae.py --workdir=bucket/runs/mae
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
read_arguments "$@"
no_words
need_arguments

# shellcheck disable=SC2016  # the hosts expand it
look='cd mim_jax 2>/dev/null || exit 0
if tmux has-session -t =mim 2>/dev/null; then echo "host running"
elif [ -s exit-code ]; then echo "host $(cat exit-code)"; else echo "host lost"; fi'

# What the hosts say together: the exit code that decides, or running, lost or away.
outcome() {
  local told code
  told=$(on_hosts "$look" 2>/dev/null) || { echo away; return; }
  told=" $(sed -n 's/^host //p' <<<"$told" | sort -u | paste -sd ' ') "
  for code in 2 3 4 1 running 75; do
    if [[ $told == *" $code "* ]]; then echo "$code"; return; fi
  done
  if [[ $told == " 0 " ]]; then echo 0; else echo lost; fi
}

{ # bash reads the braces to their end first: this file may change meanwhile
crashes=0
while ((crashes < CRASHES)); do
  crashes=$((crashes + 1)) # set back below if this was no crash
  if "$LAUNCH/create_vm.sh" $DRY && "$LAUNCH/setup_vm.sh" $DRY &&
    "$LAUNCH/run.sh" $DRY -- "${ARGS[@]}"; then
    note "again and again, while one host says that it runs:"
    looks=0
    while found=$(outcome) && [[ ! $DRY && $found == running ]]; do
      if ((++looks == 10)); then crashes=1; fi
      sleep "$POLL"
    done
  else
    found=away
  fi
  case $found in
    0) say "done" && exit 0 ;;
    1) say "exit code 1: an error in Python; see log.txt on the hosts" && exit 1 ;;
    2) say "exit code 2: config, data or run directory; see log.txt" && exit 2 ;;
    3) say "exit code 3: a loss or gradient was not finite; see log.txt" && exit 3 ;;
    4) say "exit code 4: the disk or the checkpoints; see log.txt" && exit 4 ;;
    75) crashes=0 ;;
  esac
  note "then stop at 0 to 4; after 75, a lost host or a preemption all of it again"
  now=$(state)
  [[ ! $DRY ]] || exit 0
  if [[ $now != ACTIVE ]]; then crashes=0; fi
  say "$NAME is $now, the run was $found: once more"
  sleep "$POLL"
done
say "failed $CRASHES times in a row: giving up; see log.txt on the hosts"
exit 1
}
