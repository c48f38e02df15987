# SPDX-License-Identifier: Apache-2.0
"""Accuracy of a classifier on held-out images and on sets that differ from them.

python -m mim_jax.main --config=configs/robustness.py --config.run=runs/mae-linear \
    --config.eval.sets='("imagenet_v2","imagenet_r","objectnet=/data/objectnet-1.0")' \
    --workdir=runs/mae-linear-robust

Table 1 of arXiv:2306.04898 has linear probes on ImageNet-V2, ObjectNet, ImageNet-R, -A
and -Sketch; here ReaL is a set, too. A set is "NAME", prepared by tfds, or
"NAME=FOLDER"; docs/data.md lists what a folder holds. The run must have learned from
labels, by configs/finetune.py, configs/linear_probe.py or configs/supervised.py.

Variants `:mnist` and `:digits`: five shifts of the held-out digits, for runs on them.
The sets `shift_blur` to `shift_inversion` shift any grey source with labels.

python -m mim_jax.main --config=configs/robustness.py:mnist \
    --config.run=runs/mae-mnist-finetune --workdir=runs/mae-mnist-robust

Several runs side by side: --config.also='("runs/A","runs/B")'.
"""

from mim_jax import config, presets


def get_config(variant: str = "") -> config.Tree:
    preset, chosen = config.variant(variant, presets=("mnist", "digits"))
    c = config.experiment("eval", **({"eval": "robustness"} | chosen))
    if preset:
        c.eval.sets = presets.SHIFTS[preset]
    return c
