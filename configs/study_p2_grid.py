# SPDX-License-Identifier: Apache-2.0
"""Every ratio with every mask unit, for arXiv:2306.04898.

python -m mim_jax.main --config=configs/study_p2_grid.py:mnist \
    --workdir=studies/p2-grid

docs/studies.md says how studies run. Without `:mnist` it is the paper's size.
"""

from mim_jax import config


def get_config(variant: str = "") -> config.Tree:
    size, _ = config.variant(variant, presets=("mnist", "digits"))
    c = config.experiment("study")
    c.study, c.size = "p2_grid", size or "full"
    return c
