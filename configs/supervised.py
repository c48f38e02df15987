# SPDX-License-Identifier: Apache-2.0
"""Supervised ViT-B/16 from scratch on ImageNet-1k, the baseline with labels.

python -m mim_jax.main --config=configs/supervised.py --workdir=runs/supervised

The recipe is that of fine-tuning (configs/finetune.py, arXiv:2208.04164, section 5)
without layer decay, which makes no sense before anything was learned.

Hardware: not yet run. Paper: 80.9 in 100 epochs (arXiv:2208.04164, table 1).

Variants `:mnist` and `:digits`: the same program on handwritten digits of 28 x 28
pixels and on scanned ones of 8 x 8, for two CPU cores. `:cifar10`: on CIFAR-10, for one
GPU or TPU; not yet run.

python -m mim_jax.main --config=configs/supervised.py:mnist --workdir=runs/sup-mnist

Variant `:hierarchy`: images whose latents are known (docs/theory.md); the root is the
label.

Variants `:tiny`, `:small` and `:base`: sizes for your own images, with `source=folder`.
"""

from mim_jax import config, presets
from mim_jax.evals.base import Eval


def get_config(variant: str = "") -> config.Tree:
    preset, chosen = config.variant(
        variant, presets=("mnist", "digits", "hierarchy", "cifar10", *presets.OWN)
    )
    chosen = {"objective": "supervised", "source": presets.source_of(preset)} | chosen
    c = config.experiment("train", **chosen)
    c.count_classes = chosen["source"] != "tfds"
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
    presets.apply(c, preset)
    if preset:
        presets.labels(c, preset)
    if preset in ("mnist", "digits", "hierarchy"):
        c.steps = 600
    return c
