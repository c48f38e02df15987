# SPDX-License-Identifier: Apache-2.0
"""Where the last block looks: attention maps over held-out images."""

import dataclasses

import jax
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mim_jax.evals.base import (
    Eval,
    Number,
    Passes,
    Report,
    Run,
    mean_of,
    show,
    watched,
)
from mim_jax.objectives.base import Objective
from mim_jax.ops.patches import Grid, to_float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention(Eval):
    """Attention of the last block, averaged over heads, over the whole image.

    Figures 6 and 7 of arXiv:2306.04898: the class token's attention to every patch,
    and that of one chosen patch (marked red). The numbers say how widely it is spread:
    entropy over the patches, as a share of the largest possible.

    Attributes:
        rows: images in the picture, spread over the held-out split.
        token: row and column, as shares 0..1 of the image, of the chosen patch.
        images: how many at most; all are held in memory.
    """

    rows: int = 6
    token: tuple[float, float] = (0.5, 0.5)
    images: int = 1000

    def __post_init__(self):
        if self.rows < 1 or self.images < 1:
            raise ValueError(f"rows={self.rows}, images={self.images}: want at least 1")
        if len(self.token) != 2 or not 0 <= min(self.token) <= max(self.token) <= 1:
            raise ValueError(
                f"token={self.token}: want row and column as shares 0..1 of the image"
            )

    def check_objective(self, objective: Objective) -> None:
        pass  # every objective has an encoder with attention

    def measure(self, run: Run, data: Passes) -> Report:
        objective = run.objective

        @jax.jit
        def last(params, images):
            pixels = to_float(images)
            grid = objective.grid(pixels.shape[1:])
            _, seen = objective.encode(params, pixels, taps=("attention",))
            maps = seen["attention"][-1].mean(axis=1)  # over heads: "b t t"
            row, col = self._place(grid)
            return maps[:, [0, 1 + row * grid.cols + col], 1:]

        images, parts, seen = [], [], 0
        with data.held_out() as batches:
            for batch in watched(batches, "attention", self.images):
                wanted = np.flatnonzero(batch["valid"])[: self.images - seen]
                if not len(wanted):
                    break
                maps = np.asarray(last(run.params, batch["image"]), np.float64)
                parts.append(maps[wanted])
                images.append(np.array(batch["image"][wanted]))
                seen += len(wanted)
        if not seen:
            raise ValueError("attention: the held-out split has no images")
        images, maps = np.concatenate(images), np.concatenate(parts)
        grid = objective.grid(images.shape[1:])
        numbers = {"images": Number(seen, "images")}
        for i, name in enumerate(("class_token", "chosen_token")):
            spread = _entropy(maps[:, i])
            numbers[f"attention_entropy_{name}"] = mean_of(spread, "share")
        shown = np.linspace(0, seen - 1, min(self.rows, seen)).round().astype(int)
        shaped = maps[shown].reshape(len(shown), 2, grid.rows, grid.cols)
        arrays = {
            "images": images[shown],
            "class_token": shaped[:, 0],
            "chosen_token": shaped[:, 1],
            "place": np.array([*self._place(grid), grid.patch]),
        }
        return Report(numbers=numbers, arrays=arrays)

    def _place(self, grid: Grid) -> tuple[int, int]:
        row, col = self.token
        return (
            min(int(row * grid.rows), grid.rows - 1),
            min(int(col * grid.cols), grid.cols - 1),
        )

    def draw(self, found: dict[str, Report]) -> dict[str, Figure]:
        first = next(iter(found.values())).arrays
        rows, columns = len(first["images"]), 1 + 2 * len(found)
        figure = Figure(figsize=(1.7 * columns, 1.75 * rows + 0.6), dpi=110)
        axes = figure.subplots(rows, columns, squeeze=False)
        for i in range(rows):
            image = first["images"][i]
            show(axes[i, 0], image, "held out" if i == 0 else "")
            for number, (name, report) in enumerate(found.items()):
                for offset, key in enumerate(("class_token", "chosen_token")):
                    axis = axes[i, 1 + 2 * number + offset]
                    title = f"{name}\n{key.replace('_', ' ')}" if i == 0 else ""
                    _overlay(axis, image, report.arrays[key][i], title)
                    if key == "chosen_token":
                        row, col, patch = report.arrays["place"]
                        corner = (col * patch - 0.5, row * patch - 0.5)
                        mark = Rectangle(corner, patch, patch, fill=False, color="red")
                        axis.add_patch(mark)
        figure.tight_layout()
        return {"attention": figure}


def _entropy(weights: np.ndarray) -> np.ndarray:
    """Of each row, made to sum to 1, over the logarithm of its length: 0..1."""
    weights = weights / weights.sum(axis=1, keepdims=True)
    logs = np.log(np.where(weights > 0, weights, 1))
    return -(weights * logs).sum(axis=1) / np.log(weights.shape[1])


def _overlay(axis, image: np.ndarray, weights: np.ndarray, title: str) -> None:
    """Attention as colour over a faded grey image, each map on its own scale."""
    height, width = image.shape[:2]
    grey = image.mean(axis=-1, keepdims=True).astype(np.uint8)
    show(axis, grey, title)
    axis.imshow(
        weights,
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        cmap="inferno",
        alpha=0.65,
        interpolation="nearest",
    )
