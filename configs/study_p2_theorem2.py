# SPDX-License-Identifier: Apache-2.0
"""Which latents MAE learns, by ratio and mask unit: Theorem 2 of arXiv:2306.04898.

python -m mim_jax.main --config=configs/study_p2_theorem2.py:hierarchy \
    --workdir=studies/p2-theorem2

docs/studies.md says how studies run, docs/theory.md what is asked. The images are made
by source `hierarchy`: there is no other size.
"""

from mim_jax import config


def get_config(variant: str = "") -> config.Tree:
    size, _ = config.variant(variant, presets=("hierarchy",))
    c = config.experiment("study")
    c.study, c.size = "p2_theorem2", size or "hierarchy"
    return c
