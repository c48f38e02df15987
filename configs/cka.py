# SPDX-License-Identifier: Apache-2.0
"""CKA of every block, full against masked images: figure 1 of arXiv:2208.04164.

python -m mim_jax.main --config=configs/cka.py \
    --config.run=runs/cmae-digits --workdir=runs/cmae-digits-cka

Several runs side by side: --config.also='("runs/A","runs/B")'.
"""

from mim_jax import config


def get_config(variant: str = "") -> config.Tree:
    _, chosen = config.variant(variant, presets=())
    return config.experiment("eval", **({"eval": "cka"} | chosen))
