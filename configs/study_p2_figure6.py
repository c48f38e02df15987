# SPDX-License-Identifier: Apache-2.0
"""Attention of the class token: figure 6 of arXiv:2306.04898.

python -m mim_jax.main --config=configs/study_p2_figure6.py:mnist \
    --workdir=studies/p2-figure6

docs/studies.md says how studies run. Without `:mnist` it is the paper's size.
"""

from mim_jax import config


def get_config(variant: str = "") -> config.Tree:
    size, _ = config.variant(variant, presets=("mnist", "digits"))
    c = config.experiment("study")
    c.study, c.size = "p2_figure6", size or "full"
    return c
