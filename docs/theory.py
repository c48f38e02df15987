# SPDX-License-Identifier: Apache-2.0
"""Draws the pictures of docs/theory.md.

    python docs/theory.py [FOLDER]

writes theory_masks.png, theory_readings.png, theory_curves.png, theory_linear.png and
hierarchy.png into docs/, or into FOLDER.
"""

import pathlib
import sys

import networkx as nx
import numpy as np
from matplotlib.figure import Figure

from mim_jax.data.sources.hierarchy import Hierarchy
from mim_jax.theory import Tree, curves, locate, pictures
from mim_jax.theory.linear import recovered

RATIOS = (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98)


def toy() -> nx.DiGraph:
    """The binary tree of eight pixels, with the paper's names."""
    tree = Tree.regular(2, 3)
    return nx.relabel_nodes(tree.graph(), dict(enumerate(tree.names)))


def masks() -> Figure:
    """One pixel hidden, half of them, and all but one."""
    pixels = [f"x{i}" for i in range(8)]
    hidden = {
        "one pixel hidden": pixels[:1],
        "the left half hidden": pixels[:4],
        "one pixel visible": pixels[:7],
    }
    return pictures.draw({title: locate(toy(), x) for title, x in hidden.items()})


def readings() -> Figure:
    """The readings of one mask of a graph that is no tree."""
    graph = nx.DiGraph([("z1", "z2"), ("z1", "z3"), ("z2", "z4"), ("z3", "z4")])
    graph.add_edges_from([("z2", "z5"), ("z3", "z6"), ("z4", "x2"), ("z4", "x3")])
    graph.add_edges_from([("z5", "x0"), ("z5", "x1"), ("z6", "x4"), ("z6", "x5")])
    hidden = ["x0", "x1", "x2"]
    return pictures.draw(
        {
            reading: locate(graph, hidden, reading)
            for reading in ("invertible", "frontier", "separator")
        }
    )


def linear(masks: int = 20) -> Figure:
    """What the linear masked autoencoder holds of the root, by ratio and unit."""
    tree, rng = Tree.quadtree(4), np.random.default_rng(0)
    figure = Figure(figsize=(8.5, 3.4), dpi=110, layout="constrained")
    one, two = figure.subplots(1, 2)
    for unit in (1, 2, 4):
        side = 16 // unit
        held, selective = [], []
        for ratio in RATIOS:
            count = min(max(round(ratio * side**2), 1), side**2 - 1)
            order = rng.random((masks, side**2)).argsort(axis=1)
            cells = (order < count).reshape(-1, side, 1, side, 1)
            hidden = cells.repeat(unit, axis=2).repeat(unit, axis=4)
            found = [recovered(tree, 0.9, one.ravel(), 4)[0] for one in hidden]
            whole = [recovered(tree, 0.9, one.ravel(), None) for one in hidden]
            held.append(np.mean(found))
            level = np.mean(whole, axis=0)
            selective.append(level[0] / level[tree.levels == 1].mean())
        one.plot(RATIOS, held, "o-", ms=3, label=f"unit {unit}")
        two.plot(RATIOS, selective, "o-", ms=3, label=f"unit {unit}")
    one.set_ylabel("R2 of the root, code of width 4", fontsize=8)
    two.set_ylabel("R2 of the root / mean R2 of level 1", fontsize=8)
    for axis in (one, two):
        axis.set_xlabel("mask ratio", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=7)
    return figure


def images() -> Figure:
    """Images of source `hierarchy`, of each kind."""
    kinds = {
        "symbols": dict(kind="symbols"),
        "scene": dict(kind="scene"),
        "scene, shift": dict(kind="scene", shift=True),
        "cascade": dict(kind="cascade"),
    }
    figure = Figure(figsize=(8.5, 5.6), dpi=110, layout="constrained")
    axes = figure.subplots(len(kinds), 6)
    for row, (name, fields) in zip(axes, kinds.items(), strict=True):
        source = Hierarchy(**fields)
        for axis, index in zip(row, range(6), strict=True):
            record = source[index]
            axis.imshow(record["image"], interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if source.classes:
                axis.set_title(source.classes[record["label"]], fontsize=7)
        row[0].set_ylabel(name, fontsize=8)
    return figure


def main() -> None:
    """Write the pictures."""
    folder = pathlib.Path(
        sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent
    )
    drawn = {
        "theory_masks": masks,
        "theory_readings": readings,
        "theory_curves": curves.draw,
        "theory_linear": linear,
        "hierarchy": images,
    }
    for name, draw in drawn.items():
        draw().savefig(folder / f"{name}.png")


if __name__ == "__main__":
    main()
