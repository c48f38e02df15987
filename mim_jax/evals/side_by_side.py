# SPDX-License-Identifier: Apache-2.0
"""The same images with the same patches hidden, filled in by several models."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key
from matplotlib.figure import Figure

from mim_jax.evals.base import Batch, Run
from mim_jax.evals.figures import Panel, gallery
from mim_jax.evals.images import example_fields, hidden_pixels, keys_of
from mim_jax.evals.report import Report, plain
from mim_jax.objectives.base import PixelObjective
from mim_jax.ops import similarity
from mim_jax.ops.masking import Mask, from_hidden
from mim_jax.ops.patches import Grid


class Shown(NamedTuple):
    """What `side_by_side` found.

    Attributes:
        masked_as: the model that drew the masks, as it did in training.
        original: the images, in 0..1.
        hidden: True at hidden pixels.
        records: the number of each image in its source.
        classes: of each image; "" if unknown.
        filled: by model, the images with their hidden pixels filled in, in 0..1.
        psnr: by model, in dB over the hidden pixels of each image.
        helped: the models that were given mean and deviation of every hidden patch.
        reasons: by model, why it is left out.
    """

    masked_as: str
    original: Float[np.ndarray, "r h w c"]
    hidden: Bool[np.ndarray, "r h w"]
    records: np.ndarray
    classes: tuple[str, ...]
    filled: dict[str, np.ndarray]
    psnr: dict[str, np.ndarray]
    helped: tuple[str, ...]
    reasons: dict[str, str]

    @property
    def seen(self) -> Float[np.ndarray, "r h w c"]:
        """The images with hidden pixels in grey."""
        return np.where(self.hidden[..., None], np.float32(0.5), self.original)

    @property
    def reports(self) -> dict[str, Report]:
        """The arrays of each model, as `save_arrays` takes them."""
        same = {"original": self.original, "hidden": self.hidden, "index": self.records}
        return {
            title: Report(
                numbers={},
                arrays=same | {"filled": images, "psnr_db": self.psnr[title]},
            )
            for title, images in self.filled.items()
        }


def side_by_side(
    models: dict[str, tuple[Run, Batch]], classes: tuple[str, ...], seed: int
) -> Shown | None:
    """Fill in the same hidden patches by each model; None if none predicts pixels.

    The first model that predicts pixels draws the masks. Another one has to see the
    same images, and its patches have to fit these masks.

    Args:
        models: by name, the run and the images as its own config reads them, each the
            same records in the same order.
        classes: names of the classes, in the order of labels.
        seed: of the masks.
    """
    first, filled, psnr, reasons = "", {}, {}, {}
    original = region = np.empty(0)
    batch, helped = {}, []
    for title, (run, read) in models.items():
        objective = run.objective
        if not isinstance(objective, PixelObjective):
            reasons[title] = f"{type(objective).__name__} predicts no pixels"
            continue
        mine = {name: value[read["valid"]] for name, value in read.items()}
        images = mine["image"].astype(np.float32) / 255
        fields = example_fields(mine)
        grid = objective.grid(images.shape[1:])
        if not first:
            first, batch, original = title, mine, images
            draw = jax.jit(functools.partial(_drawn, run, grid))
            region = np.asarray(draw(run.memory, fields, keys_of(mine, seed)))
        if not np.array_equal(images, original):
            reasons[title] = f"its config crops the images in another way than {first}"
            continue
        hidden = patches_of(region, grid)
        if hidden is None:
            reasons[title] = (
                f"its patches have {grid.patch} x {grid.patch} pixels, and some are "
                f"hidden in part where {first} hides patches"
            )
            continue
        fill = jax.jit(functools.partial(_filled, objective))
        found, score = fill(run.params, fields, from_hidden(hidden), original, region)
        filled[title], psnr[title] = np.asarray(found), np.asarray(score)
        if objective.normalise_target:
            helped.append(title)
    if not first:
        return None
    names = np.array([*classes, ""])  # -1, unknown, is the last
    return Shown(
        masked_as=first,
        original=original,
        hidden=region,
        records=batch["index"],
        classes=tuple(map(str, names[batch["label"]])),
        filled=filled,
        psnr=psnr,
        helped=tuple(helped),
        reasons=reasons,
    )


def _drawn(
    run: Run, grid: Grid, memory: Any, fields: Any, keys: Key[Array, " r"]
) -> Bool[Array, "r h w"]:
    """True at the pixels that a model hides, as it does in training."""
    state = dataclasses.replace(run, memory=memory)
    assert isinstance(run.objective, PixelObjective)
    return hidden_pixels(run.objective.mask(fields, keys, state), grid)


def _filled(
    objective: PixelObjective,
    params: Any,
    fields: Any,
    mask: Mask,
    original: Float[Array, "r h w c"],
    region: Bool[Array, "r h w"],
) -> tuple[Float[Array, "r h w c"], Float[Array, " r"]]:
    """Images whose hidden pixels are filled in, and their scores over these."""
    found = jnp.clip(objective.reconstruct(params, fields, mask), 0, 1)
    found = jnp.where(region[..., None], found.astype(original.dtype), original)
    return found, similarity.psnr(found, original, region)


def patches_of(
    hidden: Bool[np.ndarray, "b h w"], grid: Grid
) -> Bool[np.ndarray, "b n"] | None:
    """Which patches of a grid are hidden; None if one of them is hidden in part.

    Example:
        >>> pixels = np.zeros((1, 4, 4), bool)
        >>> pixels[:, :2, :2] = True
        >>> patches_of(pixels, Grid(rows=2, cols=2, patch=2)).tolist()
        [[True, False, False, False]]
        >>> patches_of(pixels, Grid(rows=1, cols=1, patch=4)) is None
        True
    """
    side = grid.patch
    cut = hidden.reshape(len(hidden), grid.rows, side, grid.cols, side)
    all_of, some_of = cut.all(axis=(2, 4)), cut.any(axis=(2, 4))
    if (all_of != some_of).any():
        return None
    return all_of.reshape(len(hidden), grid.size)


def picture(shown: Shown) -> Figure:
    """A row for each image: the original, what is visible, each model's filling."""
    panels = []
    for i, name in enumerate(shown.classes):
        top = i == 0
        title = "original" if top else ""
        panels.append(Panel(shown.original[i], title, left=plain(name)))
        panels.append(Panel(shown.seen[i], "visible" if top else ""))
        for run, images in shown.filled.items():
            title = plain(run).replace(", ", "\n") if top else ""
            panels.append(Panel(images[i], title, below=f"{shown.psnr[run][i]:.1f} dB"))
    title = (
        "Held-out images with the same patches hidden (grey), filled in by each model\n"
        "below: PSNR of the hidden pixels, higher is better"
    )
    return gallery(panels, 2 + len(shown.filled), (1.3, 1.5), title)
