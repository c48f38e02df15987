# SPDX-License-Identifier: Apache-2.0
"""R-MAE ViT-B/16 on ImageNet-1k for 100 epochs, arXiv:2208.04164, section 5.

python -m mim_jax.main --config=configs/rmae.py --workdir=runs/rmae

The paper has three variants: R-MAE is the default, dagger is
--config.objective.t2=independent, and double dagger is --config.objective.t2=identity.

Hardware: 32 x TPU v5e, about 2.4 h at 40 % utilisation by arithmetic; not yet run.
By the compiler's account on 8 x v5e (`python -m mim_jax.aot`) the peak is 10.9 GiB per
chip, and 3.5 with --config.scan=true --config.remat=full.
Paper: 82.7 fine-tuned (arXiv:2208.04164, table 1).

Variants `:mnist`, `:digits`, `:photos`, `:hierarchy` and `:scenes`: the same program
on handwritten digits of 28 x 28 pixels, on scanned ones of 8 x 8, on photographs, on
images whose latents are known and on those of configs/detect.py:scenes, for two CPU
cores. `:cifar10`: on CIFAR-10, for one GPU or TPU; not yet run.

python -m mim_jax.main --config=configs/rmae.py:mnist --workdir=runs/rmae-mnist

Variants `:tiny`, `:small` and `:base`: sizes for your own images, with `source=folder`.
"""

from mim_jax import config, presets


def get_config(variant: str = "") -> config.Tree:
    preset, chosen = config.variant(
        variant,
        presets=(
            *("mnist", "photos", "digits", "hierarchy", "scenes", "cifar10"),
            *presets.OWN,
        ),
    )
    chosen = {"objective": "rmae", "source": presets.source_of(preset)} | chosen
    c = config.experiment("train", **chosen)
    c.epochs = 100.0
    c.batch_size = 1024
    c.optim.base_lr = 3e-4
    c.optim.warmup_epochs = 20.0
    # By the TPU compiler's account 1.5 times as fast as a loop over the blocks.
    c.scan, c.remat = False, "none"
    presets.apply(c, preset)
    return c
