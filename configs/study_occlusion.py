# SPDX-License-Identifier: Apache-2.0
"""What hiding patches does to features: the question of arXiv:2208.04164.

python -m mim_jax.main --config=configs/study_occlusion.py:mnist \
    --workdir=studies/occlusion

docs/studies.md says how studies run. Without `:mnist` it is the paper's size.
"""

from mim_jax import config


def get_config(variant: str = "") -> config.Tree:
    size, _ = config.variant(variant, presets=("mnist", "digits"))
    c = config.experiment("study")
    c.study, c.size = "occlusion", size or "full"
    return c
