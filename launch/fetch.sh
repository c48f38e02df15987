#!/usr/bin/env bash
# Copies the run directory here, as runs/NAME: from the bucket, or else from host 0.
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
run mkdir -p "$here"
if [[ $workdir == gs://* ]]; then
  run gcloud storage rsync --recursive "$workdir" "$here"
elif [[ $BUCKET && $workdir == bucket/* ]]; then
  run gcloud storage rsync --recursive '--exclude=^compiled/' \
    "gs://$BUCKET/${workdir#bucket/}" "$here"
else
  if [[ $workdir != /* ]]; then workdir=mim_jax/$workdir; fi
  run gcloud compute tpus tpu-vm scp --recurse "$NAME:$workdir" runs/ \
    --project="$PROJECT" --zone="$ZONE" --worker=0
fi
say "$here"
