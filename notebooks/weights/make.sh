#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains MAE, R-MAE and C-MAE on the embedded digits, and writes their weights here.
#   notebooks/weights/make.sh              about half an hour on two CPU cores
#   notebooks/weights/make.sh mae          one of them
# Runs go to runs/weights-NAME; a run that was cut off goes on.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ "$#" -gt 0 ] || set -- mae rmae cmae
for name; do
  "${PYTHON:-python}" -m mim_jax.main --config="configs/$name.py:mnist" --workdir="runs/weights-$name"
  "${PYTHON:-python}" -m mim_jax.weights export "runs/weights-$name" "notebooks/weights/$name-mnist.safetensors"
done
