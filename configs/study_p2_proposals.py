# SPDX-License-Identifier: Apache-2.0
"""The proposals of arXiv:2306.04898, section 3.6, where the latents are known.

python -m mim_jax.main --config=configs/study_p2_proposals.py:hierarchy \
    --workdir=studies/p2-proposals

docs/studies.md says how studies run, docs/theory.md what is proposed. The images are
made by source `hierarchy`: there is no other size.
"""

from mim_jax import config


def get_config(variant: str = "") -> config.Tree:
    size, _ = config.variant(variant, presets=("hierarchy",))
    c = config.experiment("study")
    c.study, c.size = "p2_proposals", size or "hierarchy"
    return c
