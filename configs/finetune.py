# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning ViT-B/16 on ImageNet-1k, from a pre-training run or from scratch.

python -m mim_jax.main --config=configs/finetune.py --config.init_from.run=runs/mae \
    --workdir=runs/mae-finetune

The run that is named decides the network. This run takes its class token, embedding and
blocks; head and last norm are new. Without init_from.run the same recipe trains from
scratch (add --config.optim.layer_decay=1.0). For images of another size the positions
are resized: --config.data.image_size='(384,384)' --config.data.eval_crop_fraction=1.0.

The recipe is that of arXiv:2208.04164, section 5. What it leaves open is that of
arXiv:2111.06377, table 9: mean patch token and a new norm, layer decay 0.75, drop path
0.1, mixup 0.8, cutmix 1.0, RandAugment 9/0.5, erasing 0.25, label smoothing 0.1. MAE's
released command has base_lr 5e-4 and layer_decay 0.65 instead.

Variants `:10pct` and `:1pct` use a part of the labels: SimCLR's lists for tfds's
ImageNet (imagenet2012_subset), and a stratified draw for another source
(`:10pct,source=folder`), whose images.json has the records and their hash.

Hardware: not yet run. Paper, after 100 epochs of pre-training: MAE 83.1, R-MAE 82.7,
C-MAE 82.9; from scratch 80.9 (arXiv:2208.04164, tables 1 and 2).

Variants `:mnist` and `:digits`: the same program on handwritten digits of 28 x 28
pixels and on scanned ones of 8 x 8, for two CPU cores; `:mnist-10pct` and
`:digits-10pct` use a tenth of the labels. `:cifar10`: on CIFAR-10, for one GPU or TPU;
not yet run.

python -m mim_jax.main --config=configs/finetune.py:mnist \
    --config.init_from.run=runs/mae-mnist --workdir=runs/mae-mnist-finetune

The run ends with its accuracy on held-out images, and for both kinds of digits also
under five shifts (configs/robustness.py). Variant `:cues`: drawn shapes filled with
textures, for configs/shape_bias.py.

python -m mim_jax.main --config=configs/finetune.py:cues --workdir=runs/cues

Variants `:tiny`, `:small` and `:base`: sizes for your own images, with `source=folder`.
"""

from mim_jax import config, presets
from mim_jax.data.sources.base import Source
from mim_jax.evals.base import Eval

SHARES = {"10pct": 0.1, "1pct": 0.01, "mnist-10pct": 0.1, "digits-10pct": 0.1}


def get_config(variant: str = "") -> config.Tree:
    preset, chosen = config.variant(
        variant,
        presets=(
            "10pct",
            "1pct",
            "mnist",
            "mnist-10pct",
            "digits",
            "digits-10pct",
            "cues",
            "cifar10",
            *presets.OWN,
        ),
    )
    small = preset.removesuffix("-10pct")
    small = small if small in (*presets.CLASSES, *presets.OWN) else ""
    inherited = presets.inherited(preset, chosen)
    chosen = {"objective": "supervised", "source": presets.source_of(small)} | chosen
    c = config.experiment("train", **chosen)
    c.init_from.data = inherited
    c.count_classes = bool(inherited) or chosen["source"] != "tfds"
    c.report = config.choose(Eval, "robustness")
    c.epochs = 100.0
    c.batch_size = 1024
    c.optim.base_lr = 1e-3
    c.optim.final_lr = 1e-6
    c.optim.warmup_epochs = 5.0
    c.optim.b2 = 0.999
    c.optim.decay = "kernels"
    c.optim.layer_decay = 0.75
    c.objective.encoder.drop_path = 0.1
    c.objective.mix.update(dict(mixup=0.8, cutmix=1.0))
    c.objective.erasing.p = 0.25
    c.data.randaugment.ops = 2
    c.data.crop_scale = (0.08, 1.0)
    presets.apply(c, small)
    if small:
        presets.labels(c, small)
    if preset in SHARES:
        if chosen["source"] == "tfds":
            c.data.source.dataset = f"imagenet2012_subset/{preset}"
        else:
            whole, share = c.data.source, SHARES[preset]
            few = dict(source=whole, share=share, sampling="stratified")
            with c.data.unlocked():
                c.data.source = config.choose(Source, "few", **few)
    return c
