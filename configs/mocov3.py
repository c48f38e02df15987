# SPDX-License-Identifier: Apache-2.0
"""MoCo v3 ViT-B/16 on ImageNet-1k for 300 epochs, the recipe of arXiv:2104.02057.

python -m mim_jax.main --config=configs/mocov3.py --workdir=runs/mocov3

Hyper-parameters are those of the released ViT-B command: AdamW, weight decay 0.1 on
every parameter, base learning rate 1.5e-4 at batch 4096, crops of 8 to 100 % of the
area. Crops are bicubic here; docs/deviations.md lists all differences.

Hardware: not yet run. Paper: 76.7 linear probe (arXiv:2104.02057, table 4).

Variants `:mnist` and `:digits`: the same program on handwritten digits of 28 x 28
pixels and on scanned ones of 8 x 8, for two CPU cores.

python -m mim_jax.main --config=configs/mocov3.py:mnist --workdir=runs/mocov3-mnist

Variants `:tiny`, `:small` and `:base`: sizes for your own images, with `source=folder`.
"""

from mim_jax import config, presets
from mim_jax.evals.base import Eval


def get_config(variant: str = "") -> config.Tree:
    preset, chosen = config.variant(variant, presets=("mnist", "digits", *presets.OWN))
    chosen = {"objective": "mocov3", "source": presets.source_of(preset)} | chosen
    c = config.experiment("train", **chosen)
    c.report = config.choose(Eval, "knn")
    c.epochs = 300.0
    c.batch_size = 4096
    c.optim.base_lr = 1.5e-4
    c.optim.warmup_epochs = 40.0
    c.optim.b2 = 0.999
    c.optim.weight_decay, c.optim.decay = 0.1, "all"
    c.data.crops = 2
    c.data.crop_scale = (0.08, 1.0)
    presets.apply(c, preset)
    return c
