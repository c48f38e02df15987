# SPDX-License-Identifier: Apache-2.0
"""The curves of a run: every number of its metrics.jsonl against the step."""

import collections
import math
from typing import Any

from matplotlib.figure import Figure

from mim_jax.evals.report import plain, png
from mim_jax.run import files
from mim_jax.run.log import read_rows

_COLUMNS = 4
_FEW = 40  # points of a line that get a dot each
_FIRST, _NO_METRICS = ("loss", "lr"), ("step", "epoch")

Row = dict[str, Any]
Line = dict[int, float]  # value by step


def write(log: files.Place, picture: files.Place) -> None:
    """Draw the rows of a metrics.jsonl as a PNG; no picture if nothing was logged."""
    axes = grouped(lines_of(read_rows(log)))
    if axes:
        files.write(picture, png(draw(axes)))


def lines_of(rows: list[Row]) -> dict[str, Line]:
    """The value of each number by step, steps in order.

    If a step was logged twice, the later row counts. Values that are not finite are
    left out, and so are counts that never change. Loss and rate come first.

    Example:
        >>> rows = [{"step": 2, "loss": 1.0, "images": 9}, {"step": 1, "loss": 2.0}]
        >>> lines_of(rows)
        {'loss': {1: 2.0, 2: 1.0}}
    """
    found: dict[str, Line] = {name: {} for name in _FIRST}
    for row in rows:
        for name, value in row.items():
            number = isinstance(value, int | float) and math.isfinite(value)
            if number and name not in _NO_METRICS:
                found.setdefault(name, {})[row["step"]] = value
    return {
        name: dict(sorted(line.items()))
        for name, line in found.items()
        if len(set(line.values())) > 1
        or any(isinstance(v, float) for v in line.values())
    }


def grouped(lines: dict[str, Line]) -> dict[str, dict[str, Line]]:
    """The lines of each axis by label, by the title of the axis. A line without company
    has the label "".

    A number of an evaluation, NAME/FIRST_..._LAST, shares an axis with those of the
    same NAME, FIRST and LAST: what is measured and its unit, so that a model stands
    beside what it is compared to. Seconds share one axis.

    Example:
        >>> names = ("loss", "knn/accuracy_model_k9", "knn/accuracy_untrained_k9")
        >>> axes = grouped({name: {1: 0.5} for name in names})
        >>> {title: list(labels) for title, labels in axes.items()}
        {'loss': [''], 'knn: accuracy k9': ['model', 'untrained']}
    """
    places = {name: _place(name) for name in lines}
    shared = collections.Counter(title for title, _ in places.values())
    found: dict[str, dict[str, Line]] = {}
    for name, line in lines.items():
        title, label = places[name]
        if shared[title] == 1:
            title, label = name.replace("/", ": "), ""
        found.setdefault(title, {})[label] = line
    return found


def draw(axes: dict[str, dict[str, Line]]) -> Figure:
    """One axis for each title, with its lines by label."""
    columns = min(_COLUMNS, len(axes))
    rows = -(-len(axes) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.3 * rows), dpi=100)
    cells = figure.subplots(rows, columns, squeeze=False).ravel()
    last = max(
        step for lines in axes.values() for line in lines.values() for step in line
    )
    for cell, (title, lines) in zip(cells, axes.items(), strict=False):
        for label, line in lines.items():
            dot = "." if len(line) < _FEW else ""
            values = list(line.values())
            cell.plot(list(line), values, marker=dot, lw=1, label=plain(label))
        cell.set_title(plain(title), fontsize=8)
        cell.tick_params(labelsize=6)
        cell.set_xlim(0, 1.03 * last)
        if any(lines):
            cell.legend(fontsize=5, framealpha=0.6)
    for cell in cells[len(axes) :]:
        cell.set_axis_off()
    for cell in cells[max(0, len(axes) - columns) : len(axes)]:
        cell.set_xlabel("step", fontsize=7)
    figure.tight_layout()
    return figure


def _place(name: str) -> tuple[str, str]:
    """(title of the axis, label) of a number, if others share the axis."""
    if name.endswith("seconds"):
        return "seconds", name.removesuffix("seconds").strip("/_")
    evaluation, slash, key = name.partition("/")
    first, *middle = key.split("_")
    last = middle.pop() if middle else ""
    return (f"{evaluation}: {first} {last}", " ".join(middle)) if slash else (name, "")
