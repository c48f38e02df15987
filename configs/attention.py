# SPDX-License-Identifier: Apache-2.0
"""Attention maps of the last block: figures 6 and 7 of arXiv:2306.04898.

python -m mim_jax.main --config=configs/attention.py \
    --config.run=runs/photos --workdir=runs/photos-attention

Several runs side by side: --config.also='("runs/A","runs/B")'.
"""

from mim_jax import config


def get_config(variant: str = "") -> config.Tree:
    _, chosen = config.variant(variant, presets=())
    return config.experiment("eval", **({"eval": "attention"} | chosen))
