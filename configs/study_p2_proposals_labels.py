# SPDX-License-Identifier: Apache-2.0
"""The proposals of arXiv:2306.04898, section 3.6, judged by accuracy.

python -m mim_jax.main --config=configs/study_p2_proposals_labels.py:mnist \
    --workdir=studies/p2-proposals-labels

docs/studies.md says how studies run. Without `:mnist` it is the paper's size.
"""

from mim_jax import config


def get_config(variant: str = "") -> config.Tree:
    size, _ = config.variant(variant, presets=("mnist", "digits"))
    c = config.experiment("study")
    c.study, c.size = "p2_proposals_labels", size or "full"
    return c
