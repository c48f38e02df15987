# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on 10 % of the labels, as in arXiv:2208.04164.

python -m mim_jax.main --config=configs/study_p1_few_labels.py:mnist \
    --workdir=studies/p1-few-labels

docs/studies.md says how studies run. Without `:mnist` it is the paper's size.
"""

from mim_jax import config


def get_config(variant: str = "") -> config.Tree:
    size, _ = config.variant(variant, presets=("mnist", "digits"))
    c = config.experiment("study")
    c.study, c.size = "p1_few_labels", size or "full"
    return c
