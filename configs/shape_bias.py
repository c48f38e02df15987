# SPDX-License-Identifier: Apache-2.0
"""Whether a classifier goes by shape or by texture, where they disagree.

python -m mim_jax.main --config=configs/shape_bias.py --config.run=runs/mae-linear \
    --config.eval.set=cue_conflict=/data/cue-conflict --workdir=runs/mae-linear-bias

Table 2 of arXiv:2306.04898 does not name the head. Here it is the head of the run,
fine-tuned (configs/finetune.py) or linear (configs/linear_probe.py), and the figure
says which. docs/data.md says where to get the published images.

Without eval.set the program draws the images, for runs on such drawings: the variants
`:cues` of those two configs.

python -m mim_jax.main --config=configs/shape_bias.py --config.run=runs/cues \
    --workdir=runs/cues-bias

The shape bias of those variants is .01 from scratch (98.9 % of held-out drawings
right), .02 fine-tuned from configs/mae.py:cues (98.1 %), and .06 with a linear probe of
it (84.6 %); one seed each, 95 % intervals below .09; about 6 minutes of one x86-64 core
in all, jax 0.10.2. All go by texture: a patch of 4 pixels shows a texture, and never a
shape.

Several runs side by side: --config.also='("runs/A","runs/B")'.
"""

from mim_jax import config


def get_config(variant: str = "") -> config.Tree:
    _, chosen = config.variant(variant, presets=())
    return config.experiment("eval", **({"eval": "shape_bias"} | chosen))
