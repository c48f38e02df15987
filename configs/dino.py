# SPDX-License-Identifier: Apache-2.0
"""DINO ViT-B/16 on ImageNet-1k for 400 epochs, the recipe of arXiv:2104.14294.

python -m mim_jax.main --config=configs/dino.py --workdir=runs/dino

Hyper-parameters are those released with the paper for ViT-B/16: batch 1024, learning
rate 7.5e-4 to 2e-6, 10 warm-up epochs, weight decay 0.04 to 0.4, gradient norm 0.3,
10 local crops of 96 pixels, teacher temperature 0.04 to 0.07 over 50 epochs,
prototypes fixed for 3. Two things differ: there is no drop path (0.1 there), and
gradients are clipped by their common norm, not parameter by parameter.

Hardware: not yet run. Paper: 78.2 linear probe (arXiv:2104.14294, table 2).

Variants `:mnist` and `:digits`: the same program on handwritten digits of 28 x 28
pixels and on scanned ones of 8 x 8, for two CPU cores.

python -m mim_jax.main --config=configs/dino.py:mnist --workdir=runs/dino-mnist

Variants `:tiny`, `:small` and `:base`: sizes for your own images, with `source=folder`.
"""

from mim_jax import config, presets
from mim_jax.evals.base import Eval


def get_config(variant: str = "") -> config.Tree:
    preset, chosen = config.variant(variant, presets=("mnist", "digits", *presets.OWN))
    chosen = {"objective": "dino", "source": presets.source_of(preset)} | chosen
    c = config.experiment("train", **chosen)
    c.report = config.choose(Eval, "knn")
    c.epochs = 400.0
    c.batch_size = 1024
    c.optim.base_lr = 7.5e-4 * 256 / 1024
    c.optim.final_lr = 2e-6
    c.optim.warmup_epochs = 10.0
    c.optim.b2 = 0.999
    c.optim.weight_decay, c.optim.final_weight_decay = 0.04, 0.4
    c.optim.clip = 0.3
    c.data.crops = 2
    c.data.local_crops = 10
    c.data.crop_scale = (0.25, 1.0)
    presets.apply(c, preset)
    if preset:
        c.data.local_crops = 4
        c.data.local_size = (4, 4) if preset == "digits" else (16, 16)
        c.data.local_scale = (0.2, 0.5)
        c.objective.head.update(dict(hidden=256, bottleneck=64, out=512))
    return c
