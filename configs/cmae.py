# SPDX-License-Identifier: Apache-2.0
"""C-MAE ViT-B/16 on ImageNet-1k for 100 epochs, arXiv:2208.04164, section 5.

python -m mim_jax.main --config=configs/cmae.py --workdir=runs/cmae

Ablations are leaves of config.objective: contrast=byol (table 4), tokens=cls, avg or
patch+cls (table 3), mask_token=false with tokens=avg (table 4), cutmix and color_jitter
(table 5). With --config=configs/cmae.py:masking=none nothing is hidden (table 5).
docs/deviations.md says how each ambiguity of the paper is read.

Hardware: 32 x TPU v5e, about 4.2 h at 40 % utilisation by arithmetic; not yet run.
By the compiler's account on 8 x v5e (`python -m mim_jax.aot`) the peak is 12.3 GiB per
chip, and 4.2 with --config.scan=true --config.remat=full.
Paper: 82.9 fine-tuned (arXiv:2208.04164, table 2); 83.1 after 400 epochs, which
--config.epochs=400 trains.

Variants `:mnist`, `:digits` and `:scenes`: the same program on handwritten digits of
28 x 28 pixels, on scanned ones of 8 x 8 and on the images of configs/detect.py:scenes,
for two CPU cores. `:cifar10`: on CIFAR-10, for one GPU or TPU; not yet run.

python -m mim_jax.main --config=configs/cmae.py:mnist --workdir=runs/cmae-mnist

Variants `:tiny`, `:small` and `:base`: sizes for your own images, with `source=folder`.
"""

from mim_jax import config, presets
from mim_jax.evals.base import Eval


def get_config(variant: str = "") -> config.Tree:
    preset, chosen = config.variant(
        variant, presets=("mnist", "digits", "scenes", "cifar10", *presets.OWN)
    )
    chosen = {"objective": "cmae", "source": presets.source_of(preset)} | chosen
    c = config.experiment("train", **chosen)
    c.report = config.choose(Eval, "knn")
    c.epochs = 100.0
    c.batch_size = 1024
    c.optim.base_lr = 1.5e-4
    c.optim.warmup_epochs = 20.0
    # By the TPU compiler's account nearly 1.5 times as fast as a loop over the blocks.
    c.scan, c.remat = False, "none"
    presets.apply(c, preset)
    return c
