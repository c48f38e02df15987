#!/usr/bin/env bash
# Gives the TPU back. Files outside the bucket are lost: run fetch.sh first.
#   launch/delete_vm.sh [--dry-run]
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
read_arguments "$@"
no_words
need_settings PROJECT

found=$(state)
if [[ $found == UNKNOWN ]]; then
  say "gcloud does not tell whether $NAME is there, so it may still cost:"
  why_unknown
  exit 1
fi
if [[ $DRY || $found != NONE ]]; then
  note "if there is one:"
  queue delete --force --quiet
fi
say "$NAME is gone"
