#!/usr/bin/env bash
# Copies the run directory here, as runs/NAME: from the bucket, or else from host 0.
#   launch/fetch.sh [--dry-run] -- --config=configs/mae.py --workdir=bucket/runs/mae
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
read_arguments "$@"
no_words

workdir='' previous=''
for word in "${ARGS[@]}"; do
  if [[ $word == --workdir=* ]]; then workdir=${word#*=}; fi
  if [[ $previous == --workdir ]]; then workdir=$word; fi
  previous=$word
done
workdir=${workdir%/}
[[ $workdir ]] || fail "no --workdir among the arguments: want -- --workdir=..."

here=runs/${workdir##*/}
run mkdir -p "$here"
if [[ $BUCKET && $workdir == bucket/* ]]; then
  run gcloud storage rsync --recursive '--exclude=^compiled/' \
    "gs://$BUCKET/${workdir#bucket/}" "$here"
else
  if [[ $workdir != /* ]]; then workdir=mim_jax/$workdir; fi
  run gcloud compute tpus tpu-vm scp --recurse "$NAME:$workdir" runs/ \
    --project="$PROJECT" --zone="$ZONE" --worker=0
fi
say "$here"
