# SPDX-License-Identifier: Apache-2.0
"""Masking ratio and detection: table 3 of arXiv:2306.04898.

python -m mim_jax.main --config=configs/study_p2_table3.py:scenes \
    --workdir=studies/p2-table3

Rows for a random encoder, R-MAE and C-MAE are ours. docs/studies.md says how studies
run, docs/detection.md what is measured. Without `:scenes` it is the paper's size: MAE
on ImageNet, then COCO, whose folder COCO_DIR names.
"""

from mim_jax import config


def get_config(variant: str = "") -> config.Tree:
    size, _ = config.variant(variant, presets=("scenes",))
    c = config.experiment("study")
    c.study, c.size = "p2_table3", size or "full"
    return c
