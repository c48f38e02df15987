#!/usr/bin/env bash
# Applies the command as a JobSet to the GKE cluster that kubectl points at.
#   launch/gke_jobset.sh [--dry-run] -- --config=configs/mae.py --workdir=bucket/runs/mae
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
read_arguments "$@"
no_words
need_arguments
need_settings BUCKET IMAGE

[[ $BUCKET ]] || fail "BUCKET is empty in env.sh: the hosts need a directory in common"
# A JSON list is a YAML list too. Kubernetes expands $(NAME), and reads $$ as a dollar.
list='import json, sys
words = [word.replace("$", "$$") for word in sys.argv[1:]]
print(json.dumps(words, ensure_ascii=False))'
# shellcheck disable=SC2034  # read by name below
COMMAND=$("$PYTHON" -c "$list" \
  python -m mim_jax.main --distributed "${ARGS[@]}")
# shellcheck disable=SC2034  # read by name below
COMPILED=${COMPILED-}
manifest=$(<"$LAUNCH/jobset.yaml")
for field in NAME IMAGE GKE_ACCELERATOR GKE_TOPOLOGY HOSTS CHIPS ACCOUNT BUCKET COMPILED \
  COMMAND; do
  manifest=${manifest//"@$field@"/"${!field}"}
done
if [[ $DRY ]]; then
  printf "kubectl apply --filename=- <<'END OF MANIFEST'\n%s\nEND OF MANIFEST\n" "$manifest"
else
  kubectl apply --filename=- <<<"$manifest"
fi
