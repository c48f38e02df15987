# SPDX-License-Identifier: Apache-2.0
"""Supervised ViT-B/16 from scratch on ImageNet-1k, the baseline with labels.

python -m mim_jax.main --config=configs/supervised.py --workdir=runs/supervised

The recipe is that of fine-tuning (configs/finetune.py, arXiv:2208.04164, section 5)
without layer decay, which makes no sense before anything was learned.

Hardware: not yet run. Paper: 80.9 in 100 epochs (arXiv:2208.04164, table 1).

Variant `:digits`: the same program on scanned digits, for two CPU cores.

python -m mim_jax.main --config=configs/supervised.py:digits --workdir=runs/sup-digits
"""

from mim_jax import config, presets
from mim_jax.evals.base import Eval


def get_config(variant: str = "") -> config.Tree:
    preset, chosen = config.variant(variant, presets=("digits",))
    chosen = {"objective": "supervised", "source": preset or "tfds"} | chosen
    c = config.experiment("train", **chosen)
    c.report = config.choose(Eval, "robustness")
    c.epochs = 100.0
    c.batch_size = 1024
    c.optim.base_lr = 1e-3
    c.optim.final_lr = 1e-6
    c.optim.warmup_epochs = 5.0
    c.optim.b2 = 0.999
    c.optim.decay = "kernels"
    c.objective.encoder.drop_path = 0.1
    c.objective.mix.update(dict(mixup=0.8, cutmix=1.0))
    c.objective.erasing.p = 0.25
    c.data.randaugment.ops = 2
    c.data.crop_scale = (0.08, 1.0)
    if preset == "digits":
        presets.digits(c)
        presets.labels(c)
        c.steps = 600
    return c
