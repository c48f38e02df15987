# SPDX-License-Identifier: Apache-2.0
"""C-MAE beside MAE and other methods: table 2 of arXiv:2208.04164.

python -m mim_jax.main --config=configs/study_p1_table2.py:mnist \
    --workdir=studies/p1-table2

docs/studies.md says how studies run. Without `:mnist` it is the paper's size.
"""

from mim_jax import config


def get_config(variant: str = "") -> config.Tree:
    size, _ = config.variant(variant, presets=("mnist", "digits"))
    c = config.experiment("study")
    c.study, c.size = "p1_table2", size or "full"
    return c
