# SPDX-License-Identifier: Apache-2.0
"""Few-shot accuracy of frozen features: ridge regression on 1 to 25 labels per class.

python -m mim_jax.main --config=configs/ridge.py \
    --config.run=runs/mae-digits --workdir=runs/mae-digits-ridge

Several runs side by side: --config.also='("runs/A","runs/B")'.
"""

from mim_jax import config


def get_config(variant: str = "") -> config.Tree:
    _, chosen = config.variant(variant, presets=())
    return config.experiment("eval", **({"eval": "ridge"} | chosen))
