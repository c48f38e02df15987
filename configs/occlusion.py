# SPDX-License-Identifier: Apache-2.0
"""How little features change when patches are hidden, which arXiv:2208.04164 says of
masked image modelling: similarity, retrieval and accuracy by ratio and block.

python -m mim_jax.main --config=configs/occlusion.py \
    --config.run=runs/mae-digits --workdir=runs/mae-digits-occlusion

Several runs in one picture: --config.also='("runs/A","runs/B")'. Patches are hidden as
each model saw it in training. With --config.eval.occlusion=zero they are painted with
the mean, so that all methods see the same pixels.
"""

from mim_jax import config


def get_config(variant: str = "") -> config.Tree:
    _, chosen = config.variant(variant, presets=())
    return config.experiment("eval", **({"eval": "occlusion"} | chosen))
