#!/usr/bin/env bash
# Asks for the TPU and waits until it is there; asks again if it was taken away.
#   launch/create_vm.sh [--dry-run]
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
read_arguments "$@"
no_words
need_settings PROJECT

found=$(state)
while [[ $found == @(SUSPENDING|DELETING) ]]; do
  say "$NAME is $found"
  sleep "$POLL"
  found=$(state)
done
if [[ $found == UNKNOWN ]]; then
  say "gcloud does not tell whether $NAME is there:"
  why_unknown
  exit 1
fi
if [[ $DRY || $found == @(SUSPENDED|FAILED) ]]; then
  note "if it is SUSPENDED, FAILED or preempted:"
  say "$NAME is $found: deleting it"
  queue delete --force --quiet
  found=NONE
fi
if [[ $found == NONE ]]; then
  note "if there is none:"
  tier=()
  if [[ $SPOT == true ]]; then tier=(--spot); fi
  queue create --node-id="$NAME" --accelerator-type="$ACCELERATOR" \
    --runtime-version="$RUNTIME" "${tier[@]}"
fi
note "until it is ACTIVE:"
while found=$(state) && [[ ! $DRY && $found != ACTIVE ]]; do
  if [[ $found == @(FAILED|SUSPENDED) ]]; then
    say "$NAME is $found; why:"
    queue describe >&2
    exit 1
  fi
  say "$NAME is $found"
  sleep "$POLL"
done
say "$NAME is there"
