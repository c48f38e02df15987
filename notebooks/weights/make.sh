#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains MAE, R-MAE and C-MAE on the embedded digits, and writes their weights here.
#   notebooks/weights/make.sh                   about half an hour on two CPU cores
#   notebooks/weights/make.sh mae               one of them
#   notebooks/weights/make.sh --steps=400 rmae  for so many steps, instead of 1,500
# Runs go to runs/weights-NAME; a run that was cut off goes on.
set -euo pipefail
cd "$(dirname "$0")/../.."
steps=
case "${1:-}" in --steps=*) steps=${1#--steps=}; shift ;; esac
[ "$#" -gt 0 ] || set -- mae rmae cmae
for name; do
  "${PYTHON:-python}" -m mim_jax.main --config="configs/$name.py:mnist" \
    ${steps:+--config.steps="$steps"} --workdir="runs/weights-$name${steps:+-$steps}"
  "${PYTHON:-python}" -m mim_jax.weights export \
    "runs/weights-$name${steps:+-$steps}" "notebooks/weights/$name-mnist.safetensors"
done
