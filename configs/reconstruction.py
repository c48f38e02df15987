# SPDX-License-Identifier: Apache-2.0
"""PSNR and pictures of filled-in patches on a run's held-out images.

python -m mim_jax.main --config=configs/reconstruction.py \
    --config.run=runs/photos --workdir=runs/photos-reconstruction
"""

from mim_jax import config


def get_config(variant: str = "") -> config.Tree:
    _, chosen = config.variant(variant, presets=())
    return config.experiment("eval", **({"eval": "reconstruction"} | chosen))
