# SPDX-License-Identifier: Apache-2.0
"""Sizes at which every method runs on two CPU cores, on images that need no download.

These are demonstrations of the program, not the papers' experiments: a config's
`:photos`, `:digits` or `:cues` variant is its recipe with these leaves set.
"""

from mim_jax import config

# For each source: its number of classes, and its held-out images with a shift applied.
CLASSES = {"digits": 10, "cues": 8}
SHIFTS = {
    "digits": (
        *("digits_blur", "digits_noise", "digits_rotation"),
        *("digits_contrast", "digits_inversion"),
    ),
    "cues": (),
}


def photos(c: config.Tree) -> None:
    """A small model on small crops; it predicts pixels that are not normalised, so that
    PSNR needs no help from the true patch.

    A model soon memorises twelve photographs. Small crops and strong colour jitter
    prevent that: without them its reconstructions of held-out pictures are worse than
    a fill with their mean colour (docs/photos.md).
    """
    _plain(c)
    c.steps = 800
    c.batch_size = 64
    c.objective.encoder.update(dict(patch=4, width=64, depth=3, heads=2))
    c.objective.decoder.update(dict(width=64, depth=2, heads=2))
    c.objective.normalise_target = False
    if "color_jitter" in c.objective:
        c.objective.color_jitter = "whole"
        c.objective.jitter.update(dict(hue=0.5, gray_p=0.0))
    c.data.image_size = (32, 32)
    c.data.crop_scale = (0.05, 1.0)
    c.optim.base_lr = 1e-2
    c.optim.warmup_epochs = 10.0
    c.checkpoint.every = 250


def digits(c: config.Tree) -> None:
    """A small model on 8 x 8 scanned digits, 16 patches each."""
    _plain(c)
    c.steps = 600
    c.batch_size = 128
    _small(c, patch=2, depth=1)
    _grey(c, mean=0.3, std=0.38)
    c.data.image_size = (8, 8)
    c.data.crop_scale = (0.5, 1.0)
    c.data.flip = False  # a mirrored digit is no digit
    c.data.eval_crop_fraction = 1.0
    c.optim.base_lr = 4e-3
    c.optim.warmup_epochs = 10.0
    c.checkpoint.every = 200


def cues(c: config.Tree) -> None:
    """A small model on 32 x 32 drawn shapes, 64 patches each."""
    _plain(c)
    c.steps = 800
    c.batch_size = 64
    _small(c, patch=4, depth=2)
    _grey(c, mean=0.5, std=0.27)
    c.data.image_size = (32, 32)
    c.data.crop_scale = (0.6, 1.0)
    c.data.flip = False  # mirrored, rising stripes fall
    c.data.eval_crop_fraction = 1.0
    c.optim.base_lr = 4e-3
    c.optim.warmup_epochs = 1.0
    c.checkpoint.every = 250


def labels(c: config.Tree, preset: str = "digits") -> None:
    """Settings for labels, to apply after `digits` or `cues`: the source's classes, and
    augmentations weak enough for small images."""
    c.steps = 300
    c.objective.classes = CLASSES[preset]
    c.optim.warmup_epochs = 5.0 if preset == "digits" else 1.0
    c.data.randaugment.ops = 0
    if "mix" in c.objective:
        c.objective.mix.update(dict(mixup=0.0, cutmix=0.0))
        c.objective.erasing.p = 0.0
        c.objective.encoder.drop_path = 0.0
    if "sets" in c.report:
        c.report.sets = SHIFTS[preset]


def _small(c: config.Tree, patch: int, depth: int) -> None:
    """Networks of width 64, with a decoder of `depth` blocks and small heads."""
    objective = c.objective
    objective.encoder.update(dict(patch=patch, width=64, depth=3, heads=4))
    if "decoder" in objective:
        objective.decoder.update(dict(width=64, depth=depth, heads=4))
    for name in ("projector", "predictor"):
        if name in objective:
            objective[name].update(dict(hidden=256, out=64))
    if "ema" in objective and objective.ema.base > 0.99:
        objective.ema.base = 0.98  # a run of 600 steps, not of 100,000


def _grey(c: config.Tree, mean: float, std: float) -> None:
    """Sets one channel, and turns off what small grey images cannot show: changes of
    colour, blur and solarising."""
    objective = c.objective
    objective.mean, objective.std = (mean,), (std,)
    for name in ("jitter", "view1", "view2", "local"):
        if name in objective:
            colours = dict(saturation=0.0, hue=0.0, gray_p=0.0)
            objective[name].update(dict(**colours, blur_p=0.0, solarize_p=0.0))


def _plain(c: config.Tree) -> None:
    c.dtype, c.scan, c.remat = "float32", False, "none"
    c.data.workers = 0
