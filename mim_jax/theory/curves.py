# SPDX-License-Identifier: Apache-2.0
"""The level of c against mask ratio and unit, for the masks that training draws."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float
from matplotlib.figure import Figure

from mim_jax.maskings.base import Masking
from mim_jax.maskings.block import Block
from mim_jax.maskings.random import Random
from mim_jax.ops.patches import Grid
from mim_jax.theory.trees import Tree, mean_levels

RATIOS = (0.02, 0.05, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 0.95, 0.98)
_LINE = Grid(1, 64, 1)  # the leaves of a binary tree of six levels
_IMAGE = Grid(32, 32, 1)  # those of a quadtree of five
_MASKS = 400


class Point(NamedTuple):
    """The level of c under one masking, over many masks.

    Attributes:
        mean: level of the members of c: mean over c, then over masks.
        top: highest level in c, mean over masks.
        size: number of members of c, mean over masks.
    """

    mean: float
    top: float
    size: float


def masks(
    masking: Masking, grid: Grid, count: int = _MASKS, seed: int = 0
) -> Bool[np.ndarray, "masks n"]:
    """Which patches are hidden in so many draws of a masking that reads keys alone."""
    keys = jax.random.split(jax.random.key(seed), count)
    hidden = np.zeros((count, grid.size), bool)
    np.put_along_axis(hidden, np.asarray(masking(keys, grid).drop), True, axis=1)
    return hidden


def level(
    tree: Tree, hidden: Bool[np.ndarray, "masks leaves"], reading: str = "invertible"
) -> Point:
    """Level and size of c, over masks that each hide and show something."""
    counts = tree.level_counts(hidden, reading)
    mean, top = mean_levels(counts)
    return Point(
        float(mean.mean()), float(top.mean()), float(counts.sum(axis=1).mean())
    )


def binary(ratio: float, unit: int = 1) -> Bool[np.ndarray, "masks 64"]:
    """Random masks of the 64 leaves of a binary tree, in units of so many leaves."""
    units = Grid(1, _LINE.cols // unit, 1)
    return masks(Random(ratio=ratio), units).repeat(unit, axis=1)


def quadtree(ratio: float, unit: int = 1) -> Bool[np.ndarray, "masks 1024"]:
    """Random masks of 32 x 32 pixels, in square units of so many pixels a side."""
    return masks(Random(ratio=ratio, unit=unit), _IMAGE)


def block(side: int) -> Bool[np.ndarray, "masks 1024"]:
    """Masks of 32 x 32 pixels that hide one square of so many pixels a side."""
    return masks(_square(side, _IMAGE), _IMAGE)


def interval(length: int) -> Bool[np.ndarray, "masks 64"]:
    """Masks that hide so many neighbouring leaves of a binary tree: the columns of a
    random square."""
    grid = Grid(_LINE.cols, _LINE.cols, 1)
    hidden = masks(_square(length, grid), grid)
    return hidden.reshape(-1, grid.rows, grid.cols).max(axis=1)


def _square(side: int, grid: Grid) -> Block:
    """The masking that hides one random square of so many patches a side."""
    area = side * side
    return Block(ratio=area / grid.size, least=area, aspect=1.0, rectangles=1)


def by_ratio(
    hidden_at: Callable[[float], Bool[np.ndarray, "masks leaves"]],
    tree: Tree,
    ratios: Sequence[float] = RATIOS,
    reading: str = "invertible",
) -> dict[float, Point]:
    """The level of c at each ratio at which the masking hides and shows something."""
    found = {}
    for ratio in ratios:
        try:
            hidden = hidden_at(ratio)
        except ValueError:
            continue  # so few units have no such ratio
        found[ratio] = level(tree, hidden, reading)
    return found


def draw() -> Figure:
    """Four panels: random masks by ratio, units, contiguous masks, and the other
    reading."""
    line, image = Tree.regular(2, 6), Tree.quadtree(5)
    figure = Figure(figsize=(9.5, 6.6), dpi=110, layout="constrained")
    ((one, two), (three, four)) = figure.subplots(2, 2)
    scattered = {
        "binary tree, 64 leaves": by_ratio(binary, line),
        "quadtree, 32 x 32": by_ratio(quadtree, image),
    }
    _lines(one, "random masks, invertible", "mask ratio", scattered)
    units = {
        f"quadtree, ratio {ratio}": {
            unit: level(image, quadtree(ratio, unit)) for unit in (1, 2, 4, 8, 16)
        }
        for ratio in (0.5, 0.75)
    }
    units["binary tree, ratio 0.75"] = {
        unit: level(line, binary(0.75, unit)) for unit in (1, 2, 4, 8, 16)
    }
    _lines(two, "random masks, invertible", "side of a mask unit (pixels)", units)
    two.set_xscale("log", base=2)
    two.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    lengths = [1, 3, 6, 10, 16, 24, 32, 40, 48, 54, 58, 61, 63]
    sides = [1, 3, 7, 10, 13, 16, 19, 23, 26, 28, 30, 31]
    contiguous = {
        "interval, binary tree": {n / 64: level(line, interval(n)) for n in lengths},
        "square, quadtree": {n * n / 1024: level(image, block(n)) for n in sides},
    }
    _lines(three, "contiguous masks, invertible", "mask ratio", contiguous)
    frontier = {
        "binary tree, 64 leaves": by_ratio(binary, line, reading="frontier"),
        "quadtree, 32 x 32": by_ratio(quadtree, image, reading="frontier"),
        "interval, binary tree": {
            n / 64: level(line, interval(n), "frontier") for n in lengths
        },
    }
    _lines(four, "the reading frontier", "mask ratio", frontier)
    return figure


def _lines(
    axis: Any, title: str, across: str, lines: Mapping[str, Mapping[Any, Point]]
) -> None:
    for i, (label, points) in enumerate(lines.items()):
        x, colour = list(points), f"C{i}"
        axis.plot(x, _values(points, "mean"), "o-", color=colour, ms=3, label=label)
        axis.plot(x, _values(points, "top"), ":", color=colour)
    axis.plot([], [], ":", color="grey", label="highest level in c")
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(across, fontsize=8)
    axis.set_ylabel("level of c, mean over masks", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=7)


def _values(points: Mapping[Any, Point], name: str) -> Float[np.ndarray, " points"]:
    return np.array([getattr(point, name) for point in points.values()])
