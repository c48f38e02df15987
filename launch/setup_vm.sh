#!/usr/bin/env bash
# Puts on all hosts: the files here that git tracks, Python, JAX and the bucket. While a
# run is under way nothing is changed: its readers would start from other code.
#   launch/setup_vm.sh [--dry-run]
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
read_arguments "$@"
no_words
need_settings PROJECT BUCKET

archive=${TMPDIR:-/tmp}/mim_jax-$NAME.tar.gz
run bash -c 'set -o pipefail; cd "$1" && git ls-files -z | tar -czf "$2" --null -T -' - "$ROOT" "$archive"
run gcloud compute tpus tpu-vm scp "$archive" "$NAME:mim_jax.tar.gz" \
  --project="$PROJECT" --zone="$ZONE" --worker=all

# A host leaves out each step that is done already.
# shellcheck disable=SC2016  # the hosts expand it
script='set -eu
if tmux has-session -t =mim 2>/dev/null; then
  echo "a run is under way: its code stays as it is"; exit
fi
mkdir -p mim_jax && tar -xzf mim_jax.tar.gz -C mim_jax && cd mim_jax
apt() { sudo apt-get -qy -o DPkg::Lock::Timeout=600 "$@"; }
command -v tmux >/dev/null || { apt update; apt install tmux; }
python3 -m uv --version >/dev/null 2>&1 || python3 -m pip install --quiet --user uv
[ -x .venv/bin/python ] || python3 -m uv venv --quiet --python=3.12 .venv
python3 -m uv pip install --quiet --python=.venv/bin/python -e ".[tpu]"'
if [[ $BUCKET ]]; then
  # shellcheck disable=SC2016
  script+='
command -v gcsfuse >/dev/null || {
  key=/usr/share/keyrings/cloud.google.asc source=https://packages.cloud.google.com/apt
  curl -fsS $source/doc/apt-key.gpg | sudo tee $key >/dev/null
  echo "deb [signed-by=$key] $source gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  apt update; apt install gcsfuse
}
mkdir -p bucket
mountpoint -q bucket || gcsfuse --implicit-dirs '$(quoted "$BUCKET")' bucket'
fi
on_hosts "$script"
say "$NAME is set up"
