# SPDX-License-Identifier: Apache-2.0
"""Linear probe of frozen features extracted once, many learning rates at once.

python -m mim_jax.main --config=configs/linear.py \
    --config.run=runs/mae-digits --workdir=runs/mae-digits-probe

A quick way to the number of configs/linear_probe.py, with the same optimiser and
length, but on images without augmentation. Several runs side by side:
--config.also='("runs/A","runs/B")'.
"""

from mim_jax import config


def get_config(variant: str = "") -> config.Tree:
    _, chosen = config.variant(variant, presets=())
    return config.experiment("eval", **({"eval": "linear"} | chosen))
