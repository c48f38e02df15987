# SPDX-License-Identifier: Apache-2.0
"""Sizes at which every method runs on small images.

These are not the papers' experiments: a config's variant `:mnist`, `:photos`,
`:digits`, `:cues`, `:hierarchy` or `:scenes` is its recipe with these leaves set, for
two CPU cores and images that need no download. `:cifar10` is sized for one GPU or TPU,
as Colab lends them. `:tiny`, `:small` and `:base` are sizes for images of your own.
"""

from mim_jax import config

OWN = ("tiny", "small", "base")  # sizes for your own images
# For each source: its number of classes, and its held-out images with a shift applied.
CLASSES = {"mnist": 10, "digits": 10, "cues": 8, "hierarchy": 8, "cifar10": 10}
SHIFTS = {
    "mnist": (
        *("shift_blur", "shift_noise", "shift_rotation"),
        *("shift_contrast", "shift_inversion"),
    ),
    "digits": (
        *("digits_blur", "digits_noise", "digits_rotation"),
        *("digits_contrast", "digits_inversion"),
    ),
    "cues": (),
}


def source_of(preset: str) -> str:
    """The source that a preset reads; "tfds" for the recipe itself, ""."""
    return "tfds" if preset in ("", "cifar10", *OWN) else preset


def inherited(preset: str, chosen: dict[str, str]) -> tuple[str, ...]:
    """The parts of `data` that fine-tuning and probing take from the run that they
    begin with. Variants that name a source leave that one out, and presets that name
    everything leave out all.

    Args:
        preset, chosen: what `config.variant` returned.
    """
    if preset.removesuffix("-10pct") in CLASSES:
        return ()
    named = "source" in chosen or preset in ("10pct", "1pct")
    return (
        *(() if named else ("source",)),
        *("image_size", "flip"),
        "eval_crop_fraction",
    )


def apply(c: config.Tree, preset: str) -> None:
    """Sets the leaves of a preset; "" leaves the recipe as it is."""
    if preset:
        _PRESETS[preset](c)


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


def mnist(c: config.Tree) -> None:
    """A small model on 28 x 28 handwritten digits, 49 patches each; it predicts pixels
    as they are."""
    _plain(c)
    c.steps = 1500
    c.batch_size = 128
    _small(c, patch=4, depth=2)
    c.objective.encoder.update(dict(width=96, depth=4))
    _grey(c, side=28, mean=0.13, std=0.31)
    if "normalise_target" in c.objective:
        c.objective.normalise_target = False
    if "inpainted" in c.report:
        c.report.update(dict(rows=10, inpainted=64))
        c.also = ("knn",)
    c.optim.warmup_epochs = 5.0
    c.checkpoint.every = 500


def digits(c: config.Tree) -> None:
    """A small model on 8 x 8 scanned digits, 16 patches each."""
    _plain(c)
    c.steps = 600
    c.batch_size = 128
    _small(c, patch=2, depth=1)
    _grey(c, side=8, mean=0.3, std=0.38)
    c.data.crop_scale = (0.5, 1.0)
    c.optim.warmup_epochs = 10.0
    c.checkpoint.every = 200


def cues(c: config.Tree) -> None:
    """A small model on 32 x 32 drawn shapes, 64 patches each."""
    _plain(c)
    c.steps = 800
    c.batch_size = 64
    _small(c, patch=4, depth=2)
    _grey(c, side=32, mean=0.5, std=0.27)
    c.optim.warmup_epochs = 1.0
    c.checkpoint.every = 250


def hierarchy(c: config.Tree) -> None:
    """A small model on images of 32 x 32 pixels whose latents are known, 64 patches
    each; it predicts pixels as they are, in the units in which the source states what
    the best model reaches."""
    _plain(c)
    c.steps = 3000
    c.batch_size = 128
    _small(c, patch=4, depth=1)
    if "decoder" in c.objective:
        c.objective.decoder.width = 32
    if "normalise_target" in c.objective:
        c.objective.normalise_target = False
    # Those of mim_jax.data.sources.hierarchy.
    c.objective.mean, c.objective.std = (0.5,) * 3, (0.125,) * 3
    # A crop or a mirrored image would have other latents.
    c.data.image_size = (32, 32)
    c.data.crop_scale = c.data.crop_ratio = (1.0, 1.0)
    c.data.flip, c.data.eval_crop_fraction = False, 1.0
    c.optim.base_lr = 4e-3
    c.optim.warmup_epochs = 3.0
    c.checkpoint.every = 500


def scenes(c: config.Tree) -> None:
    """A small model on 64 x 64 scenes of digits and shapes over photographs, with 256
    patches each."""
    _plain(c)
    c.steps = 1500
    c.batch_size = 64
    _small(c, patch=4, depth=1)
    c.objective.encoder.update(dict(width=96, depth=4))
    # Those of MAE, whose crops are of whole scenes.
    c.objective.mean, c.objective.std = (0.45,) * 3, (0.29,) * 3
    c.data.image_size = (64, 64)
    if "jitter" in c.data.examples:
        c.data.examples.update(dict(most=8, mask_side=28, jitter=(0.8, 1.25)))
    else:
        c.data.crop_scale = (0.3, 1.0)
    c.data.flip = False  # a mirrored digit is none
    c.data.eval_crop_fraction = 1.0
    c.optim.base_lr = 4e-3
    c.optim.warmup_epochs = 5.0
    c.checkpoint.every = 500


def objects(c: config.Tree) -> None:
    """Heads for the scenes, to apply after `scenes`: 22 minutes of two cores."""
    objective = c.objective
    objective.encoder.drop_path = 0.0
    objective.pyramid.width = 32
    objective.proposer.convs = 1
    objective.box_head.update(dict(convs=1, hidden=128))
    objective.mask_head.convs = 1
    # Anchors of 4 to 64 pixels.
    objective.proposals.update(
        dict(side=4.0, samples=64, before=64, before_eval=100, after=64)
    )
    objective.regions.samples = 32
    objective.answers.update(dict(candidates=200, most=30))
    c.batch_size = 16
    c.steps = 2500
    c.epochs = 10.0
    c.optim.base_lr = 2.4e-2
    c.optim.warmup_epochs = 0.5


def cifar10(c: config.Tree) -> None:
    """ViT-Ti with patches of 4 on CIFAR-10, prepared by tfds, 64 patches each; for one
    GPU or TPU. The epochs and the learning rate stay the recipe's."""
    c.batch_size = 512
    c.scan, c.remat = True, "none"
    if "dataset" in c.data.source:
        c.data.source.update(dict(dataset="cifar10", held_out_split="test"))
    _small(c, patch=4, depth=2)
    c.objective.encoder.update(dict(width=192, depth=12, heads=3))
    if "decoder" in c.objective:
        c.objective.decoder.update(dict(width=128, heads=4))
    c.objective.mean, c.objective.std = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)
    c.data.image_size = (32, 32)
    c.data.eval_crop_fraction = 1.0


def tiny(c: config.Tree) -> None:
    """A small model on your own images at 64 x 64 pixels, 64 patches each, for two CPU
    cores; it predicts pixels as they are."""
    _plain(c)
    c.data.workers = None
    c.steps = 1500
    c.batch_size = 64
    _small(c, patch=8, depth=2)
    c.objective.encoder.update(dict(width=128, depth=4))
    if "decoder" in c.objective:
        c.objective.decoder.width = 96
    if "normalise_target" in c.objective:
        c.objective.normalise_target = False
    c.data.image_size = (64, 64)
    if c.data.local_crops:
        c.data.local_size = (32, 32)
    c.optim.base_lr = 4e-3
    c.optim.warmup_epochs = 5.0
    c.checkpoint.every = 500


def small(c: config.Tree) -> None:
    """ViT-S/16 on your own images at 224 x 224 pixels, for one GPU or TPU. The learning
    rate stays the recipe's."""
    c.steps = 20_000
    c.batch_size = 256
    c.objective.encoder.update(dict(width=384, depth=12, heads=6))
    if "decoder" in c.objective:
        c.objective.decoder.update(dict(width=256, depth=4, heads=8))


def base(c: config.Tree) -> None:
    """The recipe's own network and batch on your own images, for several chips."""
    c.steps = 50_000


def labels(c: config.Tree, preset: str) -> None:
    """Settings for labels, to apply after another preset: the source's classes, and
    augmentations weak enough for small images."""
    if preset in OWN:
        c.count_classes = True
        if preset != "tiny":
            c.steps //= 4
            return
    else:
        c.objective.classes = CLASSES[preset]
    if preset == "cifar10":
        return
    c.steps = 300
    c.optim.warmup_epochs = 1.0 if preset == "cues" else 5.0
    c.data.randaugment.ops = 0
    if "mix" in c.objective:
        c.objective.mix.update(dict(mixup=0.0, cutmix=0.0))
        c.objective.erasing.p = 0.0
        c.objective.encoder.drop_path = 0.0
    if "sets" in c.report:
        c.report.sets = SHIFTS.get(preset, ())


_PRESETS = {
    "photos": photos,
    "mnist": mnist,
    "digits": digits,
    "cues": cues,
    "hierarchy": hierarchy,
    "scenes": scenes,
    "cifar10": cifar10,
    "tiny": tiny,
    "small": small,
    "base": base,
}


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


def _grey(c: config.Tree, side: int, mean: float, std: float) -> None:
    """What runs on small square images of one channel share. It turns off what such
    images cannot show: changes of colour, blur and solarising."""
    c.optim.base_lr = 4e-3
    c.data.image_size = (side, side)
    c.data.crop_scale = (0.6, 1.0)
    c.data.flip = False  # a mirrored digit is none; mirrored, rising stripes fall
    c.data.eval_crop_fraction = 1.0
    objective = c.objective
    objective.mean, objective.std = (mean,), (std,)
    for name in ("jitter", "view1", "view2", "local"):
        if name in objective:
            colours = dict(saturation=0.0, hue=0.0, gray_p=0.0)
            objective[name].update(dict(**colours, blur_p=0.0, solarize_p=0.0))


def _plain(c: config.Tree) -> None:
    c.dtype, c.scan, c.remat = "float32", False, "none"
    c.data.workers = 0
