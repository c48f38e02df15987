# SPDX-License-Identifier: Apache-2.0
"""Linear probe of a frozen ViT on ImageNet-1k, MAE's recipe.

python -m mim_jax.main --config=configs/linear_probe.py \
    --config.init_from.run=runs/mae --workdir=runs/mae-linear

The run that is named decides network and feature: the class token for MAE and R-MAE,
the mean patch token for C-MAE. The recipe: LARS with momentum 0.9 and trust 0.001, no
weight decay, learning rate 6.4 at batch 16384, 90 epochs; batch norm without scale and
bias before the linear layer; random resized crops as BYOL's (arXiv:2111.06377, table
10). configs/linear.py tries many learning rates in one pass over the images.

Hardware: not yet run. Paper, after 100 epochs of pre-training: MAE 54.5, C-MAE 41.1,
without mask token 56.2 (arXiv:2208.04164, table 4).

Variant `:digits`: the same program on scanned digits, for two CPU cores.

python -m mim_jax.main --config=configs/linear_probe.py:digits \
    --config.init_from.run=runs/mae-digits --workdir=runs/mae-digits-linear

The run ends with its accuracy on held-out images, and for digits also under five shifts
(configs/robustness.py). Variant `:cues`: drawn shapes filled with textures, for
configs/shape_bias.py.
"""

from mim_jax import config, presets
from mim_jax.evals.base import Eval


def get_config(variant: str = "") -> config.Tree:
    preset, chosen = config.variant(variant, presets=("digits", "cues"))
    chosen = {"objective": "probe", "source": preset or "tfds"} | chosen
    c = config.experiment("train", **({"optimiser": "lars"} | chosen))
    c.report = config.choose(Eval, "robustness")
    c.epochs = 90.0
    c.batch_size = 16384
    c.optim.base_lr = 0.1
    c.optim.warmup_epochs = 10.0
    c.data.crop_scale = (0.08, 1.0)
    c.data.crop_retry = False
    if preset == "digits":
        presets.digits(c)
        presets.labels(c)
        c.batch_size = 256
        c.optim.base_lr = 32.0
    if preset == "cues":
        presets.cues(c)
        presets.labels(c, "cues")
        c.batch_size = 256
        c.optim.base_lr = 32.0
    return c
