# SPDX-License-Identifier: Apache-2.0
"""Average precision of boxes and masks on held-out images, by pycocotools.

python -m mim_jax.main --config=configs/detection.py --config.run=runs/mae-detect \
    --workdir=runs/mae-detect-ap

Table 3 of arXiv:2306.04898. The run must have learned by configs/detect.py. Besides the
numbers there are a table of the classes and pictures with boxes and masks. The extra
`detection` installs pycocotools.

Several runs side by side: --config.also='("runs/A","runs/B")'.
"""

from mim_jax import config


def get_config(variant: str = "") -> config.Tree:
    _, chosen = config.variant(variant, presets=())
    return config.experiment("eval", **({"eval": "detection"} | chosen))
