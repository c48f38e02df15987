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
need_settings PROJECT BUCKET

# All that decides what happens to a TPU that costs, before one is asked for.
[[ $OVER == @(delete|keep|ask) ]] || fail "OVER=$OVER: want delete, keep or ask"
[[ $CRASHES =~ ^[1-9][0-9]*$ ]] || fail "CRASHES=$CRASHES: want a number of at least 1"
[[ $POLL =~ ^[0-9]+$ ]] || fail "POLL=$POLL: want a number of seconds"
[[ $ACCELERATOR =~ ^[a-z0-9]+-[1-9][0-9]*$ ]] ||
  fail "ACCELERATOR=$ACCELERATOR: want TYPE-NUMBER, such as v5litepod-32"

# Devices of the accelerator. Its name counts cores, of which two are a device of these.
devices=${ACCELERATOR##*-}
if [[ $ACCELERATOR == @(v4|v5p)-* ]]; then devices=$((devices / 2)); fi

# No TPU is asked for by a command that cannot work.
check() {
  local where found code=0
  where=$(workdir)
  [[ $where ]] || fail "no --workdir among the arguments: want -- --workdir=..."
  if ((devices > 8)) && [[ $where != @(bucket/*|/*|*://*) ]]; then
    fail "--workdir=$where: each of several hosts has a directory of that name of its" \
      "own: want --workdir=bucket/$where"
  fi
  if [[ $where == bucket/* && ! $BUCKET ]]; then
    fail "--workdir=$where: BUCKET is empty in env.sh"
  fi
  if [[ ! $DRY ]]; then
    found=$(git -C "$ROOT" ls-files pyproject.toml 2>&1) || true
    [[ $found == pyproject.toml ]] ||
      fail "$ROOT: git lists no files there for setup_vm.sh to copy: want a clone" \
        "${found:+($found)}"
  fi
  [[ $CHECK ]] || return 0
  (cd "$ROOT" && run "$PYTHON" -m mim_jax.main "${ARGS[@]}" --check="$devices") || code=$?
  case $code in
    0) ;;
    2) fail "the command cannot work: nothing was asked for" ;;
    *) fail "the command could not be checked here: want PYTHON=... with mim_jax" \
      "(pip install -e .), or CHECK= in env.sh" ;;
  esac
}

# Shows the end of what the hosts said.
told() {
  on_hosts 'tail -n 20 mim_jax/log.txt' >&2 || true
}

# Leaves with an exit code; before, the TPU is given back or not, as env.sh says.
over() {
  local code=$1 answer=$OVER
  say "${*:2}"
  if [[ $answer == ask ]]; then
    answer=keep
    if [[ -t 0 ]] && read -r -t "${PATIENCE:-600}" -p "delete $NAME? [y/N] " answer; then
      if [[ $answer == [yY]* ]]; then answer=delete; else answer=keep; fi
    fi
  fi
  if [[ $answer == delete && $(workdir) != @(bucket/*|*://*) ]]; then
    say "the run directory is on the hosts of $NAME: fetch.sh first"
    answer=keep
  fi
  if [[ $answer == delete ]]; then
    "$LAUNCH/delete_vm.sh" ||
      say "$NAME could not be deleted and may cost: launch/delete_vm.sh tries again"
  else
    say "$NAME costs until launch/delete_vm.sh gives it back"
  fi
  exit "$code"
}

# shellcheck disable=SC2016  # the hosts expand it
look='cd mim_jax 2>/dev/null || exit 0
if tmux has-session -t =mim 2>/dev/null; then echo "host running"
elif [ -s exit-code ]; then echo "host $(cat exit-code)"; else echo "host lost"; fi'

# What the hosts say together: the exit code that decides, or running, lost or away.
outcome() {
  local told code
  told=$(on_hosts "$look" 2>/dev/null) || { echo away; return; }
  told=" $(sed -n 's/^host //p' <<<"$told" | sort -u | paste -sd ' ') "
  for code in 2 3 4 5 1 running 75; do
    if [[ $told == *" $code "* ]]; then echo "$code"; return; fi
  done
  if [[ $told == " 0 " ]]; then echo 0; else echo lost; fi
}

# The checkpoints from which the hosts went on last, or nothing: a run that is lost at the
# same place every time saves none.
began() {
  on_hosts 'grep -o "^resumed from step [0-9]*" mim_jax/log.txt | tail -n 1' \
    2>/dev/null | sort -u || true
}

{ # bash reads the braces to their end first: this file may change meanwhile
note "first, here:"
check
crashes=0 there='' before=nowhere
while ((crashes < CRASHES)); do
  crashes=$((crashes + 1)) # set back below if this was no crash
  code=0
  { "$LAUNCH/create_vm.sh" $DRY && there=yes && "$LAUNCH/setup_vm.sh" $DRY; } || code=1
  if ((code == 0)); then "$LAUNCH/run.sh" $DRY -- "${ARGS[@]}" || code=$?; fi
  if ((code == 3)); then exit 2; fi # the TPU is that of another command
  if ((code == 0)); then
    note "again and again, while one host says that it runs:"
    looks=0
    while found=$(outcome) && [[ ! $DRY && $found == running ]]; do
      # It lasted: earlier losses count no more, unless it comes back to one step only.
      if ((++looks == 10)) && now=$(began) && [[ $now != "$before" ]]; then
        crashes=1 before=$now
      fi
      sleep "$POLL"
    done
  else
    found=away
  fi
  case $found in
    0) over 0 "done" ;;
    1) told && over 1 "exit code 1: an error in Python" ;;
    2) told && over 2 "exit code 2: config, data or run directory" ;;
    3) told && over 3 "exit code 3: a loss or gradient was not finite" ;;
    4) told && over 4 "exit code 4: the disk or the checkpoints" ;;
    5) told && over 5 "exit code 5: records cannot be read" ;;
    75) crashes=0 ;;
  esac
  note "then stop at 0 to 5, and delete it or not (OVER in env.sh); after 75, a lost host or a preemption all of it again"
  now=$(state)
  [[ ! $DRY ]] || exit 0
  # Without a request it was create_vm.sh that failed: that may be for good.
  if [[ $now != @(ACTIVE|NONE|UNKNOWN) ]]; then crashes=0; fi
  # A line that drops here ends nothing there.
  if [[ $now == UNKNOWN && $there ]]; then crashes=0; fi
  say "$NAME is $now, the run was $found: once more"
  sleep "$POLL"
done
told
over 1 "failed $CRASHES times in a row: giving up"
}
