# SPDX-License-Identifier: Apache-2.0
"""The sizes at which studies run: the papers', and those for two CPU cores."""

from mim_jax import config, presets
from mim_jax.evals.base import Eval
from mim_jax.studies.grid import Patches, Shifts, Times, Training

# Sets of images that differ from those of training, at the paper's size.
IMAGENET_SHIFTS = (
    *("imagenet_v2", "objectnet", "imagenet_r", "imagenet_a", "imagenet_sketch"),
)
# Rows and columns of an image, side of a ViT patch.
_IMAGES = {"mnist": (32, 4), "cues": (32, 4), "digits": (8, 2)}
_STEPS, _LABEL_STEPS, _PROBE_STEPS = 1000, 300, 150


def shrink(tree: config.Tree, size: str) -> None:
    """Sets what all embedded runs of a size share; the recipe's variant decides the
    rest. At the paper's size, on `hierarchy` and on `scenes`, nothing changes.

    An encoder of width 64 and 3 blocks and a decoder of one block learn in 1,000 steps
    of 128 images, fine-tuning has 300 steps, and a probe 150 of 256 images.
    """
    if size in ("full", "hierarchy", "scenes"):  # whose variants have the study's size
        return
    side, patch = _IMAGES[size]
    tree.data.image_size = (side, side)
    tree.data.eval_crop_fraction = 1.0
    tree.batch_size, tree.steps = 128, _STEPS
    objective = tree.objective
    objective.encoder.update(dict(patch=patch, width=64, depth=3, heads=4))
    if "decoder" in objective:
        objective.decoder.update(dict(width=64, depth=1, heads=4))
    if tree.data.local_crops:
        tree.data.local_size = (side // 2, side // 2)
    if objective.name == "supervised":
        tree.steps = _LABEL_STEPS
    if objective.name == "probe":
        tree.steps, tree.batch_size = _PROBE_STEPS, 256
    tree.checkpoint.every = 250


def quiet(tree: config.Tree, size: str) -> None:
    """A short closing report, without pictures that nobody sees: a study measures each
    run itself."""
    if "decoder" in tree.objective:
        few = dict(images=8, draws=1, inpainted=0, rows=2)
        report = config.choose(Eval, "reconstruction", **few)
    elif tree.objective.name == "detection":
        report = config.choose(Eval, "detection", images=8, shown=1)
    elif "classes" in tree.objective:
        report = config.choose(Eval, "robustness", mistakes=0)
    elif size == "full":  # neighbours would take a pass over ImageNet
        report = config.choose(Eval, "cka", images=64)
    else:
        report = config.choose(Eval, "knn", k=(10,), rows=1, neighbours=1)
    with tree.unlocked():
        tree.report = report
    tree.also = ()
    tree.log.progress = "none"
    tree.log.tensorboard = False


def variant(training: Training, size: str) -> str:
    """The variant of the recipe: what stands after ":" in --config=configs/FILE.py:."""
    first = training.variant if size == "full" else size
    return ",".join(filter(None, (first, training.choices)))


def value(one: object, tree: config.Tree, leaf: str) -> object:
    """The value that a declared leaf takes in a tree of the recipe."""
    if isinstance(one, Patches):
        return one.count * tree.objective.encoder.patch
    if isinstance(one, Times):
        old = tree
        for part in leaf.split("."):
            old = old[part]
        new = one.factor * old
        return round(new) if isinstance(old, int) else new
    return one


def setting(one: object, size: str) -> object:
    """The value that a declared setting of a measure takes at a size."""
    if not isinstance(one, Shifts):
        return one
    return IMAGENET_SHIFTS if size == "full" else tuple(presets.SHIFTS[size])
