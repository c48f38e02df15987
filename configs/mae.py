# SPDX-License-Identifier: Apache-2.0
"""MAE ViT-B/16 on ImageNet-1k for 100 epochs, the recipe of arXiv:2208.04164.

python -m mim_jax.main --config=configs/mae.py --workdir=runs/mae

Hardware: 32 x TPU v5e, about 0.8 h at 40 % utilisation by arithmetic; not yet run.
Paper: 83.1 fine-tuned, 54.5 linear probe (arXiv:2208.04164, table 4).

Variant `:photos`: the same program on the photographs inside scikit-image and
scikit-learn, sized for two CPU cores: no data set, no accelerator.

python -m mim_jax.main --config=configs/mae.py:photos --workdir=runs/photos
"""

from mim_jax import config


def get_config(variant: str = "") -> config.Tree:
    preset, chosen = config.variant(variant, presets=("photos",))
    chosen = {"objective": "mae", "source": "tfds"} | chosen
    if preset == "photos":
        chosen = chosen | {"source": "photos"}
    c = config.experiment("train", **chosen)
    c.epochs = 100.0
    c.batch_size = 1024
    c.optim.base_lr = 1.5e-4
    c.optim.warmup_epochs = 20.0
    if preset == "photos":
        photos(c)
    return c


def photos(c: config.Tree) -> None:
    """Small pictures and a small model; pixels as they are, so that PSNR is honest."""
    c.steps = 1500
    c.batch_size = 64
    c.dtype, c.scan, c.remat = "float32", False, "none"
    c.objective.normalise_target = False
    c.objective.encoder.update(dict(patch=4, width=128, depth=4, heads=4))
    c.objective.decoder.update(dict(width=64, depth=2, heads=2))
    c.data.image_size = (32, 32)
    c.data.workers = 0
    c.optim.base_lr = 4e-3
    c.optim.warmup_epochs = 10.0
    c.checkpoint.every = 500
