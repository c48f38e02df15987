# SPDX-License-Identifier: Apache-2.0
"""Small random graphs, and Theorem 1 on them by trying all sets of latents.

Sets of nodes are bits of an int. Nothing here uses `mim_jax.theory`.
"""

import dataclasses

import networkx as nx
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """A graph and a mask: nodes 0 to latents - 1 are latents, the others pixels."""

    parents: tuple[tuple[int, ...], ...]
    dimension: tuple[int, ...]
    latents: int
    hidden: frozenset[int]

    def graph(self, names=None, dimensions=True) -> nx.DiGraph:
        names = range(len(self.parents)) if names is None else names
        made = nx.DiGraph()
        for node, dimension in enumerate(self.dimension):
            # A latent above no pixel is no pixel.
            about = {"latent": True} if node < self.latents else {}
            if dimensions:
                about["dimension"] = dimension
            made.add_node(names[node], **about)
        for node, above in enumerate(self.parents):
            made.add_edges_from((names[parent], names[node]) for parent in above)
        return made

    @property
    def visible(self) -> frozenset[int]:
        return frozenset(range(self.latents, len(self.parents))) - self.hidden

    def closure(self) -> list[int]:
        """The bits of each node with all its ancestors."""
        found = []
        for node, above in enumerate(self.parents):
            bits = 1 << node
            for parent in above:
                bits |= found[parent]
            found.append(bits)
        return found

    def weight(self, bits: int) -> int:
        return sum(d for node, d in enumerate(self.dimension) if bits >> node & 1)


def members(bits: int) -> frozenset[int]:
    return frozenset(i for i in range(bits.bit_length()) if bits >> i & 1)


def draw(seed: int, latents=(1, 5), pixels=(1, 4)) -> Case:
    """A case by its seed; every fourth graph is a tree, and masks may be empty or
    full."""
    rng = np.random.default_rng(seed)
    inner = int(rng.integers(latents[0], latents[1] + 1))
    outer = int(rng.integers(pixels[0], pixels[1] + 1))
    tree, density = seed % 4 == 0, rng.uniform(0.2, 0.8)
    parents = []
    for node in range(inner + outer):
        above = min(node, inner)
        if tree:
            parents.append((int(rng.integers(above)),) if above else ())
        else:
            chosen = np.flatnonzero(rng.random(above) < density)
            parents.append(tuple(chosen.tolist()))
    hidden = np.flatnonzero(rng.random(outer) < rng.uniform()) + inner
    dimension = rng.integers(1, 4, inner + outer)
    return Case(
        tuple(parents), tuple(dimension.tolist()), inner, frozenset(hidden.tolist())
    )


def both_sides(count: int, **sizes) -> list[Case]:
    """Cases with a hidden and a visible pixel."""
    found, seed = [], 0
    while len(found) < count:
        case = draw(seed, **sizes)
        seed += 1
        if case.hidden and case.visible:
            found.append(case)
    return found


def union(bits: list[int], nodes) -> int:
    found = 0
    for node in nodes:
        found |= bits[node]
    return found


def all_pairs(case: Case, reading: str, every_w: bool) -> dict[int, list[tuple]]:
    """All (c, W) that meet the conditions of a reading, by the dimension of c.

    Args:
        every_w: try all sets W; otherwise, for each c, only the smallest possible one:
            what c leaves of the hidden pixels' noises.
    """
    up = case.closure()
    a, b = union(up, case.hidden), union(up, case.visible)
    found: dict[int, list[tuple]] = {}
    for c in range(1 << case.latents):
        held = union(up, members(c))
        need = crossing(case, c) if reading == "frontier" else a & ~held
        if reading == "invertible" and held & ~(a & b):
            continue
        if reading == "frontier" and c & ~(a & b):
            continue
        cost = case.weight(c)
        if reading == "invertible":
            cost = sum(case.weight(up[v]) for v in members(c))
        for w in range(1 << len(up)) if every_w else (need,):
            if w & (b | held):
                continue
            if reading == "invertible" and held | w != a:
                continue
            if reading == "frontier" and (need & ~w or w & ~a):
                continue
            found.setdefault(cost, []).append((members(c), members(w)))
    return found


def crossing(case: Case, c: int) -> int:
    """The nodes from which a way leads to a hidden pixel and crosses no node of c."""
    found = union([1 << node for node in range(len(case.parents))], case.hidden)
    for node in reversed(range(len(case.parents))):
        if found >> node & 1:
            for parent in case.parents[node]:
                found |= (1 << parent) & ~c
    return found


def least(case: Case, reading: str, every_w: bool = False) -> list[tuple]:
    """The (c, W) of least dimension of c, and of these the smallest W."""
    pairs = all_pairs(case, reading, every_w)
    best = pairs[min(pairs)]
    size = min(len(w) for _, w in best)
    return [(c, w) for c, w in best if len(w) == size]


def separators(case: Case) -> tuple[int, list[frozenset[int]]]:
    """The least dimension of latents that d-separate both sides, and all such sets."""
    graph, found = case.graph(), {}
    for bits in range(1 << case.latents):
        c = members(bits)
        if nx.is_d_separator(graph, set(case.hidden), set(case.visible), set(c)):
            found.setdefault(case.weight(bits), []).append(c)
    return min(found), found[min(found)]
