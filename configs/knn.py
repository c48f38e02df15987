# SPDX-License-Identifier: Apache-2.0
"""Weighted nearest neighbours of a run's frozen features: accuracy and a picture.

python -m mim_jax.main --config=configs/knn.py \
    --config.run=runs/cmae-digits --workdir=runs/cmae-digits-knn

Several runs side by side: --config.also='("runs/A","runs/B")'.
"""

from mim_jax import config


def get_config(variant: str = "") -> config.Tree:
    _, chosen = config.variant(variant, presets=())
    return config.experiment("eval", **({"eval": "knn"} | chosen))
