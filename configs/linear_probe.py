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

Variants `:mnist` and `:digits`: the same program on handwritten digits of 28 x 28
pixels and on scanned ones of 8 x 8, for two CPU cores. `:cifar10`: on CIFAR-10, for one
GPU or TPU; not yet run.

python -m mim_jax.main --config=configs/linear_probe.py:mnist \
    --config.init_from.run=runs/mae-mnist --workdir=runs/mae-mnist-linear

The run ends with its accuracy on held-out images, and for both kinds of digits also
under five shifts (configs/robustness.py). Variant `:cues`: drawn shapes filled with
textures, for configs/shape_bias.py.

Variants `:tiny`, `:small` and `:base`: sizes for your own images, with `source=folder`.
"""

from mim_jax import config, presets
from mim_jax.evals.base import Eval


def get_config(variant: str = "") -> config.Tree:
    preset, chosen = config.variant(
        variant, presets=("mnist", "digits", "cues", "cifar10", *presets.OWN)
    )
    inherited = presets.inherited(preset, chosen)
    chosen = {"objective": "probe", "source": presets.source_of(preset)} | chosen
    c = config.experiment("train", **({"optimiser": "lars"} | chosen))
    c.init_from.data = inherited
    c.count_classes = bool(inherited) or chosen["source"] != "tfds"
    c.report = config.choose(Eval, "robustness")
    c.epochs = 90.0
    c.batch_size = 16384
    c.optim.base_lr = 0.1
    c.optim.warmup_epochs = 10.0
    c.data.crop_scale = (0.08, 1.0)
    c.data.crop_retry = False
    presets.apply(c, preset)
    if preset:
        presets.labels(c, preset)
    if preset in presets.SHIFTS or preset == "tiny":
        c.batch_size = 256
        c.optim.base_lr = 32.0
    return c
