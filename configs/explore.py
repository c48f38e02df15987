# SPDX-License-Identifier: Apache-2.0
"""A page in your browser on which you try one or two runs on an image.

python -m mim_jax.main --config=configs/explore.py \
    --config.runs='("runs/mnist",)' --workdir=runs/explore

Pick or upload an image, drag ratio and unit, paint a mask, and see what each run fills
in, where it looks and what it finds near. It needs pip install 'mim_jax[explore]'. Two
runs side by side, of the same images: --config.runs='("runs/a","runs/b")'. The page is
served on this machine alone (docs/explore.md).
"""

from mim_jax import config


def get_config(variant: str = "") -> config.Tree:
    _, chosen = config.variant(variant, presets=())
    return config.experiment("explore", **chosen)
