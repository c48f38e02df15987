# SPDX-License-Identifier: Apache-2.0
"""Pictures of images in rows and columns."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from mim_jax.evals.report import Report


class Panel(NamedTuple):
    """One image of a gallery.

    Attributes:
        image: "h w c", in 0..1 or uint8.
        title: text above the image.
        below: text below it.
        left: text at its left side, turned.
        colour: of the title.
        overlay: draws more on the image's axis, after the image.
    """

    image: np.ndarray
    title: str = ""
    below: str = ""
    colour: str = "black"
    overlay: Callable[[Any], None] | None = None
    left: str = ""


def gallery(
    panels: Sequence[Panel],
    columns: int,
    cell: tuple[float, float] = (1.7, 1.75),
    title: str = "",
) -> Figure:
    """Images row by row.

    Args:
        panels: at least one.
        columns: images per row; the last row may have fewer.
        cell: width and height in inches that an image gets, its texts included.
        title: of the whole figure.

    Example:
        >>> blank = np.zeros((8, 8, 1))
        >>> figure = gallery([Panel(blank, title="first"), Panel(blank)], columns=2)
        >>> [axis.get_title() for axis in figure.axes]
        ['first', '']
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    width = max(cell[0] * columns, 4.8 if title else 0)  # the title's own width
    size = (width, cell[1] * rows + 0.6)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, panel in itertools.zip_longest(axes, panels):
        if panel is None:
            axis.set_axis_off()
            continue
        show(axis, panel.image, panel.title, panel.colour)
        axis.set_xlabel(panel.below, fontsize=8)
        axis.set_ylabel(panel.left, fontsize=8)
        if panel.overlay is not None:
            panel.overlay(axis)
    if title:
        figure.suptitle(title, fontsize=8)
    return figure


def show(axis: Any, image: np.ndarray, title: str = "", colour: str = "black") -> None:
    """Draw an image, in 0..1 or uint8, on an axis without ticks."""
    image = image[..., 0] if image.shape[-1] == 1 else image
    top = 255 if image.dtype == np.uint8 else 1
    axis.imshow(image, cmap="gray", vmin=0, vmax=top, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(title, fontsize=8, color=colour)


def one_per_run(
    name: str,
    found: dict[str, Report],
    draw: Callable[[str, Report], Figure | None],
) -> dict[str, Figure]:
    """A figure for each run: NAME for a single run, else NAME0, NAME1, ...

    Args:
        draw: from caption and report to the figure, or to None if there is nothing to
            show.
    """
    figures = {}
    for number, (run, report) in enumerate(found.items()):
        figure = draw(run, report)
        if figure is not None:
            figures[name if len(found) == 1 else f"{name}{number}"] = figure
    return figures
