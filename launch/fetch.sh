#!/usr/bin/env bash
# Copies the run directory here, as runs/NAME: from the bucket, or else from host 0.
# A directory of that name which it did not copy from there is left alone.
#   launch/fetch.sh [--dry-run] -- --config=configs/mae.py --workdir=bucket/runs/mae
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
read_arguments "$@"
no_words

need_settings PROJECT BUCKET
workdir=$(workdir)
[[ $workdir ]] || fail "no --workdir among the arguments: want -- --workdir=..."

here=runs/${workdir##*/}
if [[ $workdir == gs://* ]]; then
  from=$workdir
elif [[ $BUCKET && $workdir == bucket/* ]]; then
  from=gs://$BUCKET/${workdir#bucket/}
else
  if [[ $workdir != /* ]]; then workdir=mim_jax/$workdir; fi
  from=$NAME:$workdir
fi
# Another run of this name would become a mixture of both.
mark=$here/fetched.txt
if [[ ! $DRY && $(ls -A "$here" 2>/dev/null) && $(cat "$mark" 2>/dev/null) != "$from" ]]
then
  fail "$here is there, and is no copy of $from: want it moved away"
fi
run mkdir -p "$here"
if [[ ! $DRY ]]; then printf '%s\n' "$from" >"$mark"; fi
if [[ $from == gs://* && $workdir == bucket/* ]]; then
  run gcloud storage rsync --recursive '--exclude=^compiled/' "$from" "$here"
elif [[ $from == gs://* ]]; then
  run gcloud storage rsync --recursive "$from" "$here"
else
  run gcloud compute tpus tpu-vm scp --recurse "$from" runs/ \
    --project="$PROJECT" --zone="$ZONE" --worker=0
fi
say "$here"
