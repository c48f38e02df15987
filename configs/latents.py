# SPDX-License-Identifier: Apache-2.0
"""Which latents of images a run's encoder tells, level by level: Theorem 2 of
arXiv:2306.04898, tested in training.

python -m mim_jax.main --config=configs/latents.py --config.run=runs/hierarchy \
    --workdir=runs/hierarchy-latents

The run is one of a variant `:hierarchy`, whose source makes images with known latents
(docs/theory.md). For a tfds set whose factors are features, such as dsprites, name them
where the run is trained, --config.data.source.extra_keys='("label_shape",)', and here:
--config.eval.fields='("label_shape",)'.
"""

from mim_jax import config


def get_config(variant: str = "") -> config.Tree:
    _, chosen = config.variant(variant, presets=())
    return config.experiment("eval", **({"eval": "latents"} | chosen))
