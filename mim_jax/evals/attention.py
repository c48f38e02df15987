# SPDX-License-Identifier: Apache-2.0
"""Attention maps of the last block over held-out images."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Array, Float, Real
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mim_jax.evals.base import Eval, Headline, Passes, Run
from mim_jax.evals.figures import Panel, gallery
from mim_jax.evals.images import valid_images
from mim_jax.evals.report import Number, Report, mean_of
from mim_jax.objectives.base import Objective
from mim_jax.ops.patches import Grid, to_float
from mim_jax.schema import check_ranges, within

_TOKENS = ("class_token", "chosen_token")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention(Eval):
    """Attention of the last block, averaged over heads, over the whole image.

    Figures 6 and 7 of arXiv:2306.04898: the attention of the class token to every
    patch, and that of one chosen patch (marked red). The numbers say how widely the
    attention is spread: its entropy over the patches, as a share of the largest
    possible entropy.

    Attributes:
        rows: images in the picture, spread over the held-out split.
        token: row and column of the chosen patch, as shares 0..1 of the image.
        images: number of images at most, of all classes alike if records are sorted by
            class; all are held in memory.
    """

    description: ClassVar[str] = (
        "Where the last block looks. Bright patches get the most attention: from the "
        "class token on the left of each pair, from the patch marked red on the right."
    )
    headlines: ClassVar[tuple[Headline, ...]] = (
        Headline(
            "attention_entropy_class_token",
            "attention entropy",
            "share",
            "neither",
            "How widely the class token spreads its attention: 100 % looks at every "
            "patch alike, 0 % at one patch only.",
        ),
    )

    rows: int = within(6, least=1, most=1000)
    token: tuple[float, float] = within((0.5, 0.5), least=0, most=1)
    images: int = within(1000, least=1)

    def __post_init__(self):
        check_ranges(self)

    def check_objective(self, objective: Objective) -> None:
        pass  # every objective has an encoder with attention

    def measure(self, run: Run, data: Passes) -> Report:
        objective = run.objective

        @jax.jit
        def last(params, images):
            maps = last_attention(objective, params, images)
            grid = objective.grid(images.shape[1:])
            row, col = self._place(grid)
            return maps[:, [0, 1 + row * grid.cols + col], 1:]

        images, maps, indices = [], [], []
        with data.held_out(spread=True) as batches:
            for batch, rows in valid_images(batches, "attention", self.images):
                found = np.asarray(last(run.params, batch["image"]), np.float64)
                maps.append(found[rows])
                images.append(batch["image"][rows])
                indices.append(batch["index"][rows])
        # In the order of the source, which the picture's rows are spread over.
        order = np.argsort(np.concatenate(indices), kind="stable")
        images, maps = np.concatenate(images)[order], np.concatenate(maps)[order]
        grid = objective.grid(images.shape[1:])
        numbers = {"images": Number(len(images), "images")}
        arrays = {"place": np.array([*self._place(grid), grid.patch])}
        shown = np.linspace(0, len(images) - 1, min(self.rows, len(images)))
        shown = shown.round().astype(int)
        arrays["images"] = images[shown]
        for i, name in enumerate(_TOKENS):
            spread = _entropy(maps[:, i])
            numbers[f"attention_entropy_{name}"] = mean_of(spread, "share")
            arrays[f"entropy_{name}"] = spread
            arrays[name] = maps[shown, i].reshape(-1, grid.rows, grid.cols)
        return Report(numbers=numbers, arrays=arrays)

    def _place(self, grid: Grid) -> tuple[int, int]:
        """Row and column of the chosen patch in the grid."""
        row, col = self.token
        return (
            min(int(row * grid.rows), grid.rows - 1),
            min(int(col * grid.cols), grid.cols - 1),
        )

    def draw(self, found: dict[str, Report]) -> dict[str, Figure]:
        first = next(iter(found.values())).arrays
        panels = []
        for i, image in enumerate(first["images"]):
            top = i == 0
            panels.append(Panel(image, title="held out" if top else ""))
            grey = image.mean(axis=-1, keepdims=True).astype(np.uint8)
            for name, report in found.items():
                for key in _TOKENS:
                    title = f"{name}\n{key.replace('_', ' ')}" if top else ""
                    weights = report.arrays[key][i]
                    mark = report.arrays["place"] if key == "chosen_token" else None
                    overlay = functools.partial(_overlay, grey, weights, mark)
                    panels.append(Panel(grey, title=title, overlay=overlay))
        title = (
            "Attention of the last block, mean over heads: bright patches get most of "
            "it, each map on a scale of its own\nclass token: what it looks at; chosen "
            "token: what the patch framed in red looks at"
        )
        columns = 1 + len(_TOKENS) * len(found)
        return {"attention": gallery(panels, columns, title=title)}


def last_attention(
    objective: Objective, params: Any, images: Real[Array, "b h w c"]
) -> Float[Array, "b t t"]:
    """Attention of the last block over whole images, the mean over heads: how much each
    token, the class token first, gets (last axis) of each."""
    _, seen = objective.encode(params, to_float(images), taps=("attention",))
    return seen["attention"][-1].mean(axis=1)


def _entropy(weights: Float[np.ndarray, "n m"]) -> Float[np.ndarray, " n"]:
    """Entropy of each row, scaled to sum 1, as a share of the largest, log(m)."""
    weights = weights / weights.sum(axis=1, keepdims=True)
    logs = np.log(np.where(weights > 0, weights, 1))
    return -(weights * logs).sum(axis=1) / np.log(weights.shape[1])


def _overlay(image: np.ndarray, weights: np.ndarray, place, axis) -> None:
    """Draw attention as colour over an image, each map on a scale of its own.

    Args:
        place: row, column and side in pixels of a patch to mark red, or None.
    """
    height, width = image.shape[:2]
    axis.imshow(
        weights,
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        cmap="inferno",
        alpha=0.65,
        interpolation="nearest",
    )
    if place is not None:
        row, col, patch = place
        corner = (col * patch - 0.5, row * patch - 0.5)
        axis.add_patch(Rectangle(corner, patch, patch, fill=False, color="red"))
