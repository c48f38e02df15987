# SPDX-License-Identifier: Apache-2.0
"""Many masks on one tree: `mim_jax.theory.locate` for arrays of parents."""

import dataclasses
import functools
from collections.abc import Iterator

import networkx as nx
import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

READINGS = ("invertible", "frontier")
_AT_ONCE = 64  # masks: one bit each of a word per node


@dataclasses.dataclass(frozen=True, eq=False)
class Tree:
    """A tree, or several, whose leaves are the pixels; every node has dimension 1.

    Attributes:
        parents: the parent of each node, -1 for a root; nodes are their positions.
    Raises:
        ValueError: a parent is no node, or a node is its own ancestor.

    Example:
        >>> tree = Tree(np.array([-1, 0, 0, 1, 1, 2, 2]))
        >>> tree.leaves.tolist(), tree.levels.tolist()
        ([3, 4, 5, 6], [2, 1, 1, 0, 0, 0, 0])
        >>> hidden = np.array([[True, False, False, False], [True, True, False, False]])
        >>> [np.flatnonzero(c).tolist() for c in tree.locate(hidden)]
        [[1], [0]]
    """

    parents: Int[np.ndarray, " n"]

    def __post_init__(self):
        parents = self.parents
        wrong = np.flatnonzero((parents < -1) | (parents >= len(parents)))
        if len(wrong):
            raise ValueError(
                f"node {wrong[0]} has the parent {parents[wrong[0]]}: want -1, or a "
                f"node below {len(parents)}"
            )
        _ = self.depths  # raises if there is a cycle

    @classmethod
    def regular(cls, children: int, levels: int) -> "Tree":
        """The balanced tree whose latents have so many children each. Nodes are
        numbered from the root, level by level; children are neighbours."""
        inner = sum(children**depth for depth in range(levels))
        return cls(np.concatenate([[-1], np.arange(inner).repeat(children)]))

    @classmethod
    def quadtree(cls, levels: int) -> "Tree":
        """The quadtree over an image of 2**levels x 2**levels pixels. Each level is
        numbered row by row, the root first, the pixels last."""
        parents, first = [np.array([-1])], 0
        for side in (2**level for level in range(levels)):
            row, col = np.divmod(np.arange(4 * side * side), 2 * side)
            parents.append(first + row // 2 * side + col // 2)
            first += side * side
        return cls(np.concatenate(parents))

    @functools.cached_property
    def leaves(self) -> Int[np.ndarray, " leaves"]:
        """The pixels: nodes without children, ascending."""
        inner = np.zeros(len(self.parents), bool)
        inner[self.parents[self.parents >= 0]] = True
        return np.flatnonzero(~inner)

    @functools.cached_property
    def levels(self) -> Int[np.ndarray, " n"]:
        """The level of each node: edges of the longest way down, 0 for pixels."""
        found = np.zeros(len(self.parents), int)
        for nodes in self._by_depth[:0:-1]:
            np.maximum.at(found, self.parents[nodes], found[nodes] + 1)
        return found

    @functools.cached_property
    def names(self) -> list[str]:
        """Names of the nodes as in the paper: latents z1, z2, ... and pixels x0, ..."""
        is_leaf = np.isin(np.arange(len(self.parents)), self.leaves)
        number = np.where(is_leaf, is_leaf.cumsum() - 1, (~is_leaf).cumsum())
        pairs = zip(is_leaf, number, strict=True)
        return [f"{'x' if leaf else 'z'}{i}" for leaf, i in pairs]

    def graph(self) -> nx.DiGraph:
        """The same tree for `mim_jax.theory.locate`; its nodes are ints."""
        made = nx.DiGraph()
        made.add_nodes_from(range(len(self.parents)))
        made.add_edges_from(
            (int(parent), node)
            for node, parent in enumerate(self.parents)
            if parent >= 0
        )
        return made

    def locate(
        self,
        hidden: Bool[np.ndarray, "masks leaves"],
        reading: str = "invertible",
    ) -> Bool[np.ndarray, "masks n"]:
        """Which nodes are in c, for each mask; time proportional to masks x nodes.

        Args:
            hidden: True where a mask hides a pixel, in the order of `leaves`.
            reading: as for `mim_jax.theory.locate`, which has a third one.
        Raises:
            ValueError: another reading, or masks of another number of pixels.
        """
        found = np.zeros((len(hidden), len(self.parents)), bool)
        for masks, words in self._located(hidden, reading):
            for place, nodes in zip(words, self._by_depth, strict=True):
                found[masks, nodes] = _bits(place)[:, : masks.stop - masks.start].T
        return found

    def level_counts(
        self,
        hidden: Bool[np.ndarray, "masks leaves"],
        reading: str = "invertible",
    ) -> Int[np.ndarray, "masks levels"]:
        """How many members of c are at each level, for each mask, from level 0 to the
        root's. Arguments and errors are those of `locate`; it needs less memory."""
        found = np.zeros((len(hidden), self.levels.max() + 1), int)
        for masks, words in self._located(hidden, reading):
            for place, nodes in zip(words, self._by_depth, strict=True):
                levels = self.levels[nodes]
                for level in range(1, levels.max() + 1):  # pixels are never in c
                    bits = _bits(place[levels == level])
                    count = bits.sum(axis=0, dtype=int)
                    found[masks, level] += count[: masks.stop - masks.start]
        return found

    @functools.cached_property
    def depths(self) -> Int[np.ndarray, " n"]:
        """Edges between each node and its root."""
        depth = (self.parents >= 0).astype(int)
        ancestor = self.parents.copy()
        inside = np.flatnonzero(ancestor >= 0)
        # Each round doubles how far above a node its known ancestor is.
        for _ in range(len(self.parents).bit_length() + 1):
            depth[inside] += depth[ancestor[inside]]
            ancestor[inside] = ancestor[ancestor[inside]]
            inside = inside[ancestor[inside] >= 0]
        if len(inside):
            node = self._on_a_cycle(int(inside[0]))
            raise ValueError(f"node {node} is its own ancestor: want a tree")
        return depth

    def _on_a_cycle(self, node: int) -> int:
        """The first node that comes twice on the way up from a node."""
        seen = set()
        while node not in seen:
            seen.add(node)
            node = int(self.parents[node])
        return node

    @functools.cached_property
    def _by_depth(self) -> list[Int[np.ndarray, " k"]]:
        """The nodes of each depth, siblings side by side in the order of parents."""
        place = np.zeros(len(self.parents), int)
        every = np.argsort(self.depths, kind="stable")
        parts = np.split(every, np.cumsum(np.bincount(self.depths))[:-1])
        for i, nodes in enumerate(parts):
            if i:
                order = np.argsort(place[self.parents[nodes]], kind="stable")
                parts[i] = nodes = nodes[order]
            place[nodes] = np.arange(len(nodes))
        return parts

    @functools.cached_property
    def _families(self) -> list[tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"]]]:
        """For each depth, the places of nodes with children among the nodes of that
        depth, and where the children of each begin among those of the next depth."""
        found = []
        for nodes, below in zip(self._by_depth, self._by_depth[1:], strict=False):
            family = self.parents[below]
            starts = np.flatnonzero(np.diff(family, prepend=-2))
            place = np.full(len(self.parents), -1)
            place[nodes] = np.arange(len(nodes))
            found.append((place[family[starts]], starts))
        return found

    def _located(
        self, hidden: Bool[np.ndarray, "masks leaves"], reading: str
    ) -> Iterator[tuple[slice, list[UInt64[np.ndarray, " k"]]]]:
        """For each group of masks a word per node, by depth as in `_by_depth`; a bit
        says whether the node is in c of that mask."""
        if reading not in READINGS:
            raise ValueError(
                f"reading={reading!r}: want one of {READINGS}; "
                "mim_jax.theory.locate has all readings"
            )
        if hidden.shape[1] != len(self.leaves):
            raise ValueError(
                f"masks of {hidden.shape[1]} pixels: want {len(self.leaves)}, the "
                "leaves of the tree"
            )
        for first in range(0, len(hidden), _AT_ONCE):
            some = hidden[first : first + _AT_ONCE]
            yield slice(first, first + len(some)), self._words(some, reading)

    def _words(
        self, hidden: Bool[np.ndarray, "masks leaves"], reading: str
    ) -> list[UInt64[np.ndarray, " k"]]:
        every = np.uint64(2 ** len(hidden) - 1)
        leaf = np.zeros(len(self.parents), np.uint64)
        leaf[self.leaves] = _packed(hidden)
        is_leaf = np.zeros(len(self.parents), bool)
        is_leaf[self.leaves] = True
        members: list[UInt64[np.ndarray, " k"]] = []
        over_hidden = over_visible = np.zeros(0, np.uint64)
        for depth in range(len(self._by_depth) - 1, -1, -1):
            nodes = self._by_depth[depth]
            above_hidden = leaf[nodes]
            above_visible = np.where(is_leaf[nodes], ~above_hidden & every, 0)
            c = np.zeros(len(nodes), np.uint64)
            if depth < len(self._families):
                inner, starts = self._families[depth]

                def any_child(words, starts=starts):
                    return np.bitwise_or.reduceat(words, starts)

                above_hidden[inner] = any_child(over_hidden)
                above_visible[inner] = any_child(over_visible)
                mixed = above_hidden[inner] & above_visible[inner]
                if reading == "invertible":
                    c[inner] = mixed & ~any_child(over_hidden & over_visible)
                else:
                    c[inner] = mixed & any_child(over_hidden & ~over_visible)
            over_hidden, over_visible = above_hidden, above_visible
            members.append(c)
        return members[::-1]


def mean_levels(
    counts: Int[np.ndarray, "masks levels"],
) -> tuple[Float[np.ndarray, " masks"], Float[np.ndarray, " masks"]]:
    """Mean level of the members of c, and the highest, for each mask; NaN without any.

    Args:
        counts: as `Tree.level_counts` returns them.
    """
    levels, size = np.arange(counts.shape[1]), counts.sum(axis=1)
    top = np.where(counts > 0, levels, -1).max(axis=1)
    empty = size == 0
    mean = (counts @ levels) / np.maximum(size, 1)
    return np.where(empty, np.nan, mean), np.where(empty, np.nan, top)


def numbered(group: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """The same groups, numbered in the order of their first members.

    Example:
        >>> numbered(np.array([7, 7, 2, 7, 5])).tolist()
        [0, 0, 1, 0, 2]
    """
    first, inverse = np.unique(group, return_index=True, return_inverse=True)[1:]
    return np.argsort(np.argsort(first)).astype(np.int32)[inverse]


def _packed(bits: Bool[np.ndarray, "masks k"]) -> UInt64[np.ndarray, " k"]:
    """A word for each column, whose bit i is row i."""
    words = np.zeros(bits.shape[1], np.uint64)
    for i, row in enumerate(bits):
        words |= row.astype(np.uint64) << np.uint64(i)
    return words


def _bits(words: UInt64[np.ndarray, " k"]) -> np.ndarray:
    """Inverse of `_packed`: uint8 of a row for each word."""
    return np.unpackbits(
        words.astype("<u8").view(np.uint8).reshape(-1, 8), axis=1, bitorder="little"
    )
