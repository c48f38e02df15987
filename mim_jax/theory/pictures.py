# SPDX-License-Identifier: Apache-2.0
"""Pictures of graphs with their masks, in the manner of arXiv:2306.04898, figure 4."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mim_jax.theory.locating import Graph, Located, Node

_BLUE, _PALE, _ORANGE, _GREY = "#1f77b4", "#c6dcf0", "#fbd3a6", "#777777"
_MOST_NAMES = 24  # nodes of a level that have room for their names


def draw(found: Mapping[str, Located]) -> Figure:
    """Graphs side by side, each with its mask and with what `locate` found.

    Args:
        found: at least one, by the title of its panel.
    """
    places = {title: layout(one.graph) for title, one in found.items()}
    widths = [_extent(place)[0] for place in places.values()]
    tall = max(_extent(place)[1] for place in places.values())
    cell = 0.52 if max(widths) <= _MOST_NAMES else 12 / max(widths)
    figure = Figure(
        figsize=(max(4.5, cell * (sum(widths) + len(widths))), 0.8 * tall + 1.4),
        dpi=110,
        layout="constrained",
    )
    axes = figure.subplots(1, len(found), squeeze=False, width_ratios=widths)[0]
    for axis, (title, one) in zip(axes, found.items(), strict=True):
        _panel(axis, one, places[title])
        axis.set_title(f"{title}\n{_result(one)}", fontsize=8)
    figure.legend(
        handles=_legend(),
        loc="outside lower center",
        ncols=3,
        fontsize=7,
        frameon=False,
    )
    return figure


def layout(graph: Graph) -> dict[Node, tuple[float, int]]:
    """A place for each node that is above a pixel, or is one: (x, level).

    Pixels stand side by side, those of one parent together. A latent stands over the
    middle of its children, and nodes of a level do not overlap.
    """
    children, x = graph.digraph.succ, dict[Node, float]()
    seen: set[Node] = set()
    waiting = [node for node in graph.digraph if not graph.digraph.pred[node]][::-1]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in graph.pixels:
            x[node] = float(len(x))
        waiting += [child for child in children[node]][::-1]
    for level in range(1, max(graph.level.values(), default=0) + 1):
        nodes = [node for node, height in graph.level.items() if height == level]
        wanted = {}
        for node in nodes:
            below = [x[child] for child in children[node] if child in x]
            wanted[node] = sum(below) / len(below)
        x |= _apart(wanted)
    return {node: (x[node], level) for node, level in graph.level.items()}


def _apart(wanted: dict[Node, float]) -> dict[Node, float]:
    """Places near the wanted ones, in their order, with distances of at least 1."""
    # Groups of neighbours at distance 1, each as [sum of wanted starts, nodes].
    groups: list[tuple[float, list[Node]]] = []
    for node in sorted(wanted, key=lambda node: wanted[node]):
        groups.append((wanted[node], [node]))
        while len(groups) > 1:
            (total, left), (more, right) = groups[-2:]
            if more / len(right) - total / len(left) >= len(left):
                break
            # A member's wanted start of the group is its place minus those before it.
            both = total + more - len(right) * len(left)
            groups[-2:] = [(both, left + right)]
    return {
        node: total / len(nodes) + i
        for total, nodes in groups
        for i, node in enumerate(nodes)
    }


def _extent(place: Mapping[Node, tuple[float, int]]) -> tuple[float, int]:
    """Width and height of a layout, in nodes."""
    x = [one for one, _ in place.values()]
    return max(x) - min(x) + 1, 1 + max(level for _, level in place.values())


def _panel(axis: Any, found: Located, place: Mapping[Node, tuple[float, int]]) -> None:
    graph, pixels = found.graph.digraph, found.graph.pixels
    for parent, child in graph.edges:
        if child in place:
            one, other = place[parent], place[child]
            axis.plot(*zip(one, other, strict=True), color=_GREY, lw=0.7, zorder=1)
    per_level = [level for _, level in place.values()]
    most = max(per_level.count(level) for level in set(per_level))
    size = 330 if most <= _MOST_NAMES else 330 * (_MOST_NAMES / most) ** 2
    for node, (x, y) in place.items():
        square = node in pixels
        axis.scatter(
            *(x, y, size),
            c=_colour(node, found),
            marker="s" if square else "o",
            edgecolors=_GREY,
            linewidths=0.8,
            zorder=2,
        )
        if node in found.hidden:
            axis.scatter(x, y, 0.5 * size, c="black", marker="x", lw=1.2, zorder=4)
        if most <= _MOST_NAMES:
            axis.text(
                *(x, y if not square else y - 0.38, str(node)),
                ha="center",
                va="center",
                fontsize=6.5,
                color="white" if node in found.c else "black",
                zorder=3,
            )
    (width, height), left = _extent(place), min(x for x, _ in place.values())
    axis.set_xlim(left - 0.8, left + width - 0.2)
    axis.set_ylim(-0.7, height - 0.5)
    axis.set_axis_off()


def _colour(node: Node, found: Located) -> str:
    if node in found.c:
        return _BLUE
    if node in found.shared:
        return _PALE
    return _ORANGE if node in found.s_m else "white"


def _result(found: Located) -> str:
    if not found.c:
        return "nothing is shared"
    if len(found.c) > 6:
        return f"c: {len(found.c)} latents, mean level {found.mean_level:.2f}"
    names = ", ".join(sorted(map(str, found.c)))
    return f"c = {{{names}}}, mean level {found.mean_level:.3g}"


def _legend() -> Sequence[Line2D]:
    def mark(label: str, marker: str, colour: str, edge: str = _GREY) -> Line2D:
        return Line2D(
            [],
            [],
            marker=marker,
            ls="",
            color=colour,
            markeredgecolor=edge,
            markersize=7,
            label=label,
        )

    return [
        mark("in c", "o", _BLUE),
        mark("shared, not in c", "o", _PALE),
        mark("its noise is in $s_m$", "o", _ORANGE),
        mark("hidden pixel", "x", "black", "black"),
        mark("visible pixel", "s", "white"),
        mark("above visible pixels only", "o", "white"),
    ]
