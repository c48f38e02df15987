# SPDX-License-Identifier: Apache-2.0
"""Whether a classifier goes by shape or by texture, where they disagree.

python -m mim_jax.main --config=configs/shape_bias.py --config.run=runs/mae-linear \
    --config.eval.set=cue_conflict=/data/cue-conflict --workdir=runs/mae-linear-bias

Table 2 of arXiv:2306.04898, which does not name the head: here that of the run, fine-
tuned (configs/finetune.py) or linear (configs/linear_probe.py), and the figure says
which. docs/data.md says where the published images lie.

Without eval.set: images that the program draws, for runs on the same drawings, the
variants `:cues` of those two.

python -m mim_jax.main --config=configs/shape_bias.py --config.run=runs/cues \
    --workdir=runs/cues-bias

Several runs side by side: --config.also='("runs/A","runs/B")'.
"""

from mim_jax import config


def get_config(variant: str = "") -> config.Tree:
    _, chosen = config.variant(variant, presets=())
    return config.experiment("eval", **({"eval": "shape_bias"} | chosen))
