# shellcheck shell=bash
# Every script sources this file: the settings, the command line and --dry-run.
#   launch/X.sh [--dry-run] [WORD...] -- ARGUMENTS OF python -m mim_jax.main
set -euo pipefail

LAUNCH=${MIM_LAUNCH:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)}
# shellcheck disable=SC2034
ROOT=$(dirname "$LAUNCH")
PYTHON=${PYTHON:-python}
LAUNCH_ENV=${LAUNCH_ENV:-$LAUNCH/env.sh}
# A bare name would be looked for in PATH first, and a Slurm job starts in another folder.
if [[ $LAUNCH_ENV != /* ]]; then LAUNCH_ENV=$PWD/$LAUNCH_ENV; fi
export LAUNCH_ENV
# shellcheck source=launch/env.sh
source "$LAUNCH_ENV"
# A file of settings that is older than one of these must not end watch.sh half-way.
: "${CHECK=true}" "${OVER=ask}" "${POLL=60}" "${CRASHES=5}"
exec 3>&1 # --dry-run writes here, also from within $(...)

say() { [[ ${DRY-} ]] || printf '%s: %s\n' "$(basename "$0" .sh)" "$*" >&2; }
note() { [[ ! $DRY ]] || printf '# %s\n' "$*" >&3; }
fail() {
  DRY='' say "$@"
  exit 2
}

# Sets DRY, the WORDS before -- and the ARGS after it, unchanged.
read_arguments() {
  DRY='' WORDS=()
  while (($#)) && [[ $1 != -- ]]; do
    if [[ $1 == --dry-run ]]; then DRY=--dry-run; else WORDS+=("$1"); fi
    shift
  done
  ARGS=("${@:2}")
}
no_words() {
  ((${#WORDS[@]} == 0)) ||
    fail "unexpected '${WORDS[0]}': want [--dry-run] -- --config=... --workdir=..."
}
need_arguments() {
  ((${#ARGS[@]})) || fail "no arguments: want [--dry-run] -- --config=... --workdir=..."
}

# Refuses those of the named settings that are as they came; --dry-run only says so.
need_settings() {
  local name
  for name in "$@"; do
    [[ ${!name} == @(my-project|my-bucket|*/my-project/*) ]] || continue
    if [[ $DRY ]]; then
      note "$name=${!name} is a placeholder"
    else
      fail "$name=${!name} is a placeholder: edit $LAUNCH_ENV"
    fi
  done
}

# The value of --workdir among the arguments, or nothing.
workdir() {
  local word found='' previous=''
  for word in "${ARGS[@]}"; do
    if [[ $word == --workdir=* ]]; then found=${word#*=}; fi
    if [[ $previous == --workdir ]]; then found=$word; fi
    previous=$word
  done
  printf '%s' "${found%/}"
}

# The words as one line that a shell reads back as the same words.
quoted() {
  local line
  printf -v line '%q ' "$@"
  printf '%s' "${line% }"
}

# Runs a command; with --dry-run shows it instead.
run() {
  if [[ $DRY ]]; then printf '%s\n' "$(quoted "$@")" >&3; else "$@"; fi
}

queue() {
  run gcloud compute tpus queued-resources "$1" "$NAME" \
    --project="$PROJECT" --zone="$ZONE" "${@:2}"
}

# Runs a text on all hosts at once; their login shells read it.
on_hosts() {
  run gcloud compute tpus tpu-vm ssh "$NAME" --project="$PROJECT" --zone="$ZONE" \
    --worker=all --command="$1"
}

# NONE if gcloud lists the requests and NAME is not among them; else UNKNOWN: without a
# network or a login it says nothing, and what it does not say may still cost.
absent() {
  local names
  names=$(gcloud compute tpus queued-resources list --project="$PROJECT" \
    --zone="$ZONE" '--format=value(name)' 2>/dev/null) || { echo UNKNOWN; return; }
  if grep -qxE "(.*/)?$NAME" <<<"$names"; then echo UNKNOWN; else echo NONE; fi
}

# Shows what gcloud says that keeps it from telling the state.
why_unknown() { queue describe >&2 || true; }

# The state of the request: ACTIVE, WAITING_FOR_RESOURCES, ...; SUSPENDED also if only the
# machine was taken away; NONE if there is no request; UNKNOWN if nobody can tell now.
state() {
  local found node=''
  found=$(queue describe '--format=value(state.state)' 2>/dev/null) || found=$(absent)
  if [[ $DRY || $found == ACTIVE ]]; then
    node=$(run gcloud compute tpus tpu-vm describe "$NAME" --project="$PROJECT" \
      --zone="$ZONE" '--format=value(state)' 2>/dev/null) || true
  fi
  if [[ $node == @(PREEMPTED|TERMINATED) ]]; then found=SUSPENDED; fi
  printf '%s\n' "${found:-NONE}"
}
