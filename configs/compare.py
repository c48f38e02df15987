# SPDX-License-Identifier: Apache-2.0
"""Several runs on one page, runs/compare/report/index.html, that needs no network.

python -m mim_jax.main --config=configs/compare.py \
    --config.runs='("runs/mae-digits","runs/cmae-digits")' --workdir=runs/compare

A table of numbers that a click sorts, the same images through all models, neighbours,
CKA, attention, t-SNE, training losses, the commands of the runs, and what differs in
their configs. --config.also='("ridge",)' adds other evaluations. Runs must read the
same images, or those that `:source=NAME` and config.data.source name.
"""

from mim_jax import config


def get_config(variant: str = "") -> config.Tree:
    _, chosen = config.variant(variant, presets=())
    return config.experiment("compare", **chosen)
