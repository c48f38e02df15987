# SPDX-License-Identifier: Apache-2.0
"""Supervised ViT-B/16 from scratch on ImageNet-1k, the baseline with labels.

python -m mim_jax.main --config=configs/supervised.py --workdir=runs/supervised

Optimiser and length are those of fine-tuning in arXiv:2208.04164, section 5; mixing
images, drop path and layer decay belong to the fine-tuning job.

Hardware: not yet run. Paper: 80.9 in 100 epochs (arXiv:2208.04164, table 1).

Variant `:digits`: the same program on scanned digits, for two CPU cores.

python -m mim_jax.main --config=configs/supervised.py:digits --workdir=runs/sup-digits
"""

from mim_jax import config, embedded
from mim_jax.evals.base import Eval


def get_config(variant: str = "") -> config.Tree:
    preset, chosen = config.variant(variant, presets=("digits",))
    chosen = {"objective": "supervised", "source": preset or "tfds"} | chosen
    c = config.experiment("train", **chosen)
    c.report = config.choose(Eval, "knn")
    c.epochs = 100.0
    c.batch_size = 1024
    c.optim.base_lr = 1e-3
    c.optim.final_lr = 1e-6
    c.optim.warmup_epochs = 5.0
    c.optim.b2 = 0.999
    c.data.crop_scale = (0.08, 1.0)
    if preset == "digits":
        embedded.digits(c)
        c.objective.classes = 10
    return c
