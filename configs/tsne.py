# SPDX-License-Identifier: Apache-2.0
"""t-SNE of ten classes, and how well they separate: figure 8 of arXiv:2306.04898.

python -m mim_jax.main --config=configs/tsne.py \
    --config.run=runs/cmae-digits --workdir=runs/cmae-digits-tsne

Several runs side by side: --config.also='("runs/A","runs/B")'.
"""

from mim_jax import config


def get_config(variant: str = "") -> config.Tree:
    _, chosen = config.variant(variant, presets=())
    return config.experiment("eval", **({"eval": "tsne"} | chosen))
