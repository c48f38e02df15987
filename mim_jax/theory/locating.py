# SPDX-License-Identifier: Apache-2.0
"""Where a mask divides a hierarchy of latents: Theorem 1 of arXiv:2306.04898.

A node with a noise of its own is a function of its parents and this noise. The nodes
without children are the pixels, and a mask hides some of them. `locate` finds the
latents c that hold what the hidden and the visible pixels share.
"""

import dataclasses
import functools
from collections.abc import Collection, Hashable, Iterable, Mapping
from numbers import Integral
from typing import Any

import networkx as nx

Node = Hashable
READINGS = ("invertible", "frontier", "separator")
STYLES = ("latents", "noises")


@dataclasses.dataclass(frozen=True)
class Graph:
    """A graph of latents and pixels that has been checked.

    Attributes:
        digraph: edges go from parents to children.
        pixels: the observables.
        dimension: of each node's noise, at least 1.
        level: edges of the longest way down from a node to a pixel, 0 for pixels; a
            latent above no pixel has no level.
    """

    digraph: nx.DiGraph
    pixels: frozenset[Node]
    dimension: Mapping[Node, int]
    level: Mapping[Node, int]

    @classmethod
    def of(cls, graph: nx.Graph) -> "Graph":
        """Checks a graph.

        A node may have the attribute `dimension`, default 1. Pixels are the nodes
        without children; a node whose attribute `latent` is True never is one.

        Raises:
            ValueError: the graph is not directed, has a cycle, or a node has an
                attribute that cannot be; the message names the node.
        """
        if not isinstance(graph, nx.DiGraph):
            raise ValueError("the graph has no directions: want a networkx.DiGraph")
        try:
            order = list(nx.topological_sort(graph))
        except nx.NetworkXUnfeasible:
            node = nx.find_cycle(graph)[0][0]
            raise ValueError(
                f"node {node!r} is its own ancestor: want a graph without cycles"
            ) from None
        dimension, pixels = {}, set()
        for node, about in graph.nodes(data=True):
            size = about.get("dimension", 1)
            if not isinstance(size, Integral) or size < 1:
                raise ValueError(
                    f"node {node!r} has dimension={size!r}: want an int of at least 1 "
                    "(merge a node without noise into its parents)"
                )
            dimension[node] = int(size)
            latent = about.get("latent")
            if latent is False and graph.succ[node]:
                raise ValueError(
                    f"node {node!r} is a pixel (latent=False) and has children: want "
                    "pixels without children"
                )
            if not graph.succ[node] and not latent:
                pixels.add(node)
        level: dict[Node, int] = dict.fromkeys(pixels, 0)
        for node in reversed(order):
            below = [level[child] for child in graph.succ[node] if child in level]
            if below:
                level[node] = 1 + max(below)
        return cls(graph, frozenset(pixels), dimension, level)

    def hidden(self, names: Iterable[Node]) -> frozenset[Node]:
        """The pixels of these names.

        Raises:
            ValueError: a name is unknown, comes twice, or is a latent's.
        """
        found = set()
        for name in names:
            if name not in self.digraph:
                raise ValueError(f"hidden {name!r} is no node of the graph")
            if name not in self.pixels:
                why = "has children" if self.digraph.succ[name] else "is a latent"
                raise ValueError(f"hidden {name!r} {why}: want names of pixels only")
            if name in found:
                raise ValueError(f"hidden {name!r} comes twice: want each name once")
            found.add(name)
        return frozenset(found)

    def ancestry(
        self, nodes: Iterable[Node], cut: Collection[Node] = ()
    ) -> frozenset[Node]:
        """The nodes and all their ancestors, on ways that pass no node of `cut`."""
        found = {node for node in nodes if node not in cut}
        waiting = list(found)
        while waiting:
            for parent in self.digraph.pred[waiting.pop()]:
                if parent not in found and parent not in cut:
                    found.add(parent)
                    waiting.append(parent)
        return frozenset(found)

    def above(self, nodes: Iterable[Node], below: Collection[Node]) -> frozenset[Node]:
        """Those of the nodes that have a child in `below`."""
        children = self.digraph.succ
        return frozenset(v for v in nodes if any(one in below for one in children[v]))

    def total(self, nodes: Iterable[Node]) -> int:
        """Sum of the dimensions of the noises of these nodes."""
        return sum(self.dimension[node] for node in nodes)


@dataclasses.dataclass(frozen=True)
class Located:
    """What the two sides of a mask share, and what each side has for itself.

    The hidden pixels are a function of (c, s_m), the visible ones of (c, s_mc).

    Attributes:
        graph: the graph.
        hidden: the hidden pixels.
        reading: how c is understood, see `locate`.
        shared: the latents above a hidden and a visible pixel.
        c: latents; they hold what is shared.
        s_m: nodes whose noise only the hidden pixels need.
        s_mc: nodes whose noise the visible pixels need besides c. It is one choice;
            others are as valid.
        s_mc_latents: latents that s_mc has besides these noises.
    """

    graph: Graph = dataclasses.field(repr=False)
    hidden: frozenset[Node] = dataclasses.field(repr=False)
    reading: str
    shared: frozenset[Node] = dataclasses.field(repr=False)
    c: frozenset[Node]
    s_m: frozenset[Node]
    s_mc: frozenset[Node]
    s_mc_latents: frozenset[Node] = frozenset()

    @functools.cached_property
    def levels(self) -> dict[Node, int]:
        """The level of each member of c."""
        return {node: self.graph.level[node] for node in self.c}

    @property
    def mean_level(self) -> float:
        """Mean level of the members of c; NaN if there are none."""
        return sum(self.levels.values()) / len(self.c) if self.c else float("nan")

    @property
    def c_dimension(self) -> int:
        """Dimension of c, the sum over its members.

        A member has the dimension of its noise. In the reading `invertible` it also
        holds the noises of all its ancestors, and has as many dimensions as these;
        then this takes time proportional to the size of c times that of the graph.
        """
        if self.reading != "invertible":
            return self.graph.total(self.c)
        return sum(self.graph.total(self.graph.ancestry([node])) for node in self.c)

    @property
    def information(self) -> int:
        """Dimensions of all noises of shared latents; each counts once."""
        return self.graph.total(self.shared)

    @property
    def s_m_dimension(self) -> int:
        """Dimension of s_m."""
        return self.graph.total(self.s_m)

    @property
    def s_mc_dimension(self) -> int:
        """Dimension of s_mc, with its latents."""
        return self.graph.total([*self.s_mc, *self.s_mc_latents])


def locate(
    graph: nx.Graph,
    hidden: Iterable[Node],
    reading: str = "invertible",
    style: str = "latents",
) -> Located:
    """The latents c that the hidden and the visible pixels share: Algorithms 1 and 2.

    Readings:

    * "invertible": every node determines its parents and its noise, as Assumption 1 of
      the paper says. c is the lowest shared latents: those without a shared child.
    * "frontier": a child does not determine its parents. c is the shared latents with
      a child that is above hidden pixels only.
    * "separator": a set of latents of least dimension that d-separates the two sides.
      It need not be unique; of several, this is the closest to the hidden pixels. Its
      s_m may depend on c.

    The first two take time proportional to nodes and edges.

    Args:
        graph: edges go from parents to children. Nodes without children are pixels,
            unless their attribute `latent` is True. Nodes may have a `dimension`.
        hidden: names of the hidden pixels; none and all are allowed, and share nothing.
        style: how s_mc of the reading "frontier" is written: with latents as far as
            these help, or as noises alone.
    Raises:
        ValueError: a cycle; a name that is unknown, repeated or no pixel's; a dimension
            below 1. The message names the node.

    Example:
        >>> import networkx as nx
        >>> tree = nx.DiGraph([("z1", "z2"), ("z1", "z3"), ("z2", "x0"), ("z2", "x1")])
        >>> tree.add_edges_from([("z3", "x2"), ("z3", "x3")])
        >>> sorted(locate(tree, ["x0"]).c), sorted(locate(tree, ["x0", "x1"]).c)
        (['z2'], ['z1'])
        >>> sorted(locate(tree, ["x0", "x1", "x2"], "frontier").c)
        ['z1', 'z3']
    """
    if reading not in READINGS:
        raise ValueError(f"reading={reading!r}: want one of {READINGS}")
    if style not in STYLES:
        raise ValueError(f"style={style!r}: want one of {STYLES}")
    model = Graph.of(graph)
    masked = model.hidden(hidden)
    over_hidden = model.ancestry(masked)
    over_visible = model.ancestry(model.pixels - masked)
    shared = over_hidden & over_visible
    only_hidden, only_visible = over_hidden - shared, over_visible - shared
    found = functools.partial(Located, model, masked, reading, shared)
    if reading == "invertible":
        c = shared - model.above(shared, shared)
        return found(c, only_hidden, only_visible)
    if reading == "separator":
        c = _separator(model, masked, over_hidden | over_visible)
        return found(
            c, model.ancestry(masked, c), model.ancestry(model.pixels - masked, c)
        )
    c = model.above(shared, only_hidden)
    if style == "noises":
        return found(c, only_hidden, model.ancestry(model.pixels - masked, c))
    return found(c, only_hidden, only_visible, model.above(shared, only_visible) - c)


def _separator(
    model: Graph, hidden: frozenset[Node], nodes: frozenset[Node]
) -> frozenset[Node]:
    """The smallest set of latents that d-separates hidden from visible pixels.

    It is a minimum cut of nodes in the moral graph of all ancestors of pixels.
    """
    visible = model.pixels - hidden
    if not hidden or not visible:
        return frozenset()
    moral = nx.moral_graph(model.digraph.subgraph(nodes))
    # Each node is an edge from its way in to its way out; only latents can be cut.
    flow, source, target = nx.DiGraph(), object(), object()
    for node in nodes:
        limit: dict[str, Any] = {"capacity": model.dimension[node]}
        flow.add_edge((node, 0), (node, 1), **({} if node in model.pixels else limit))
    for one, other in moral.edges:
        flow.add_edge((one, 1), (other, 0))
        flow.add_edge((other, 1), (one, 0))
    flow.add_edges_from((source, (node, 0)) for node in visible)
    flow.add_edges_from(((node, 1), target) for node in hidden)
    # Of several cuts networkx returns the one closest to the target.
    _, (before, _) = nx.minimum_cut(flow, source, target)
    return frozenset(v for v in nodes if (v, 0) in before and (v, 1) not in before)
