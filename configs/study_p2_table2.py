# SPDX-License-Identifier: Apache-2.0
"""Masking ratio and shape bias: table 2 of arXiv:2306.04898.

python -m mim_jax.main --config=configs/study_p2_table2.py:cues \
    --workdir=studies/p2-table2

docs/studies.md says how studies run. Without `:cues` it is the paper's size.
"""

from mim_jax import config


def get_config(variant: str = "") -> config.Tree:
    size, _ = config.variant(variant, presets=("cues",))
    c = config.experiment("study")
    c.study, c.size = "p2_table2", size or "full"
    return c
