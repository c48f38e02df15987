# SPDX-License-Identifier: Apache-2.0
"""The training losses of the compared runs."""

import collections
import dataclasses
import html
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from mim_jax.compare.sections import tag_of
from mim_jax.evals.report import plain
from mim_jax.run import files
from mim_jax.run.loading import Loaded
from mim_jax.run.log import read_rows

_LINES = ("-", "--", "-.", ":")  # told apart without colour
_SPREAD = 10  # from this ratio of largest to smallest on, an axis is logarithmic


# Steps, and the loss of each.
Line = tuple[list[int], list[float]]


def logged(folder: files.Place) -> Line:
    """The training loss that the log of a run directory holds."""
    rows = read_rows(folder / "metrics.jsonl")
    # Rows without are of evaluations.
    rows = [row for row in rows if row.get("loss") is not None]
    return [row["step"] for row in rows], [row["loss"] for row in rows]


def curves(trained: dict[str, Loaded], lines: Mapping[str, Line]) -> Figure | None:
    """Training losses, on the same axes where they are the same function; None if no
    run logged one.

    Args:
        lines: what `logged` returned of each run.
    """
    groups: dict[tuple, dict[str, Line]] = {}
    styles = {}
    for number, (title, one) in enumerate(trained.items()):
        if lines[title][0]:
            groups.setdefault(_loss_of(one), {})[title] = lines[title]
            styles[title] = {"color": f"C{number}", "ls": _LINES[number % 4]}
    if not groups:
        return None
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    size = (4.4 * columns, 3.4 * rows)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    cells = figure.subplots(rows, columns, squeeze=False).ravel()
    for cell in cells[len(groups) :]:
        cell.set_axis_off()
    shared = collections.Counter(key[0] for key in groups)
    for axis, (key, group) in zip(cells, groups.items(), strict=False):
        for title, (steps, losses) in group.items():
            dot = "." if len(steps) < 40 else ""
            axis.plot(steps, losses, marker=dot, label=plain(title), **styles[title])
        named = f"{key[0]}, settings of its own" if shared[key[0]] > 1 else key[0]
        axis.set_title(f"loss of {named}", fontsize=9)
        _scale(axis.set_yscale, [v for _, losses in group.values() for v in losses])
        _scale(axis.set_xscale, [steps[-1] for steps, _ in group.values()])
        axis.set_xlabel(f"updates of the parameters{_noted(axis.get_xscale())}")
        axis.set_ylabel(f"loss{_noted(axis.get_yscale())}")
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=7)
    return figure


def _scale(choose: Any, values: list[float]) -> None:
    """Make an axis logarithmic where its values lie far apart."""
    if min(values) > 0 and max(values) >= _SPREAD * min(values):
        choose("log")


def _noted(scale: str) -> str:
    return ", log scale" if scale == "log" else ""


def _loss_of(one: Loaded) -> tuple:
    """What has to be equal for two losses to be the same function: the method, and
    every setting of it but the sizes of its networks."""
    objective = one.training.objective
    values = {
        # A concrete objective is a dataclass.
        field.name: getattr(objective, field.name)
        for field in dataclasses.fields(objective)  # pyright: ignore[reportArgumentType]
        if field.name not in ("encoder", "decoder")
    }
    return type(objective).__name__, repr(values)


def section(lines: Mapping[str, Line], curves: Figure | None) -> str:
    """The curves, and which runs have none, as HTML."""
    parts = [tag_of("training loss", curves)] if curves is not None else []
    parts += [
        f"<p class='note'>{html.escape(title)}: no loss was logged in its directory, "
        "as in one that was made from a file of weights.</p>"
        for title, (steps, _) in lines.items()
        if not steps
    ]
    return "\n".join(parts)
