# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN with ViT-B/16 on COCO, from a pre-training run or from scratch.

python -m mim_jax.main --config=configs/detect.py --config.init_from.run=runs/mae \
    --config.data.source.path=/data/coco --workdir=runs/mae-detect

The folder has COCO's annotations/, train2017/ and val2017/; `:source=tfds` reads
tfds's coco/2017, which has boxes and no masks. The run that is named decides the
network; its positions are resized to 64 x 64 patches. The evaluation needs the extra
`detection`.

The recipe is ViTDet's (arXiv:2203.16527), for the 45 epochs of arXiv:2306.04898: AdamW
with a rate of 1e-4 for 64 images, weight decay .1, layer decay .7, drop path .1,
large-scale jitter to 1024 pixels, a tenth of the rate after 8/9 of the run and again
after 26/27. As in arXiv:2111.11429, all blocks attend to the whole image and a feature
pyramid network follows; ViTDet's windows and pyramid are
--config.objective.window=16 --config.objective.pyramid.kind=simple.

Hardware: not yet run. Paper: box AP 39.72, mask AP 36.35 with MAE's ratio .75
(arXiv:2306.04898, table 3).

Variant `:scenes`: digits and drawn shapes over photographs, 64 x 64 pixels, sized for
two CPU cores; no data set and no accelerator are needed. The variant `:scenes` of
mae.py, rmae.py and cmae.py pre-trains on the same images.

python -m mim_jax.main --config=configs/detect.py:scenes \
    --config.init_from.run=runs/mae-scenes --workdir=runs/scenes-detect
"""

from mim_jax import config, presets
from mim_jax.evals.base import Eval

TRAINING_IMAGES = 118_000  # what ViTDet counts as an epoch of COCO


def get_config(variant: str = "") -> config.Tree:
    preset, chosen = config.variant(variant, presets=("scenes",))
    source = preset or "coco"
    plugins = {"objective": "detection", "source": source, "examples": "instances"}
    c = config.experiment("train", **(plugins | chosen))
    c.count_classes = True
    c.report = config.choose(Eval, "detection")
    c.epochs = 45.0
    c.epoch_images = TRAINING_IMAGES
    c.batch_size = 64
    c.optim.base_lr = 4e-4
    c.optim.b2 = 0.999
    c.optim.weight_decay = 0.1
    c.optim.decay = "kernels"
    c.optim.layer_decay = 0.7
    c.optim.warmup_epochs = 250 * 64 / TRAINING_IMAGES
    c.optim.drops = (8 / 9, 26 / 27)
    c.data.image_size = (1024, 1024)
    # By the TPU compiler's account faster than a loop over the blocks, and smaller.
    c.scan = False
    if chosen.get("source") == "tfds":
        c.data.source.dataset = "coco/2017"
    if preset:
        c.epoch_images = None
        presets.scenes(c)
        presets.objects(c)
    return c
