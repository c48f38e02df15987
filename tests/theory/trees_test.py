# SPDX-License-Identifier: Apache-2.0
"""Many masks on one tree: the same as one by one, and the numbers of Figure 4."""

import itertools

import numpy as np
import pytest

from mim_jax.theory import Tree, locate
from mim_jax.theory.trees import mean_levels

READINGS = ("invertible", "frontier")


def one_by_one(tree, hidden, reading):
    graph, found = tree.graph(), np.zeros((len(hidden), len(tree.parents)), bool)
    for row, mask in zip(found, hidden, strict=True):
        c = locate(graph, tree.leaves[mask].tolist(), reading).c
        row[list(c)] = True
    return found


def masks_of_size(count, hidden):
    return np.array(
        [
            np.isin(np.arange(count), chosen)
            for chosen in itertools.combinations(range(count), hidden)
        ]
    )


def exact(count, leaves, hidden, seed=0):
    """Random masks that hide so many leaves."""
    order = np.random.default_rng(seed).random((count, leaves)).argsort(axis=1)
    return order < hidden


@pytest.mark.parametrize("reading", READINGS)
def test_all_masks_of_a_small_tree_at_once(reading):
    tree = Tree.regular(2, 3)
    hidden = np.array(list(itertools.product([False, True], repeat=8)))
    want = one_by_one(tree, hidden, reading)
    np.testing.assert_array_equal(tree.locate(hidden, reading), want)


def uneven(seed, count=60):
    """A forest with leaves at all depths, whose nodes have no order."""
    rng = np.random.default_rng(seed)
    parents = np.array([rng.integers(-1, (i + 1) // 2) for i in range(count)])
    names = rng.permutation(count)
    made = np.empty(count, int)
    made[names] = np.where(parents >= 0, names[parents], -1)
    return Tree(made)


@pytest.mark.parametrize("reading", READINGS)
def test_random_masks_of_a_quadtree_and_of_uneven_forests(reading):
    for seed, tree in enumerate([Tree.quadtree(3), *map(uneven, range(12))]):
        rng = np.random.default_rng(seed)
        hidden = rng.random((70, len(tree.leaves))) < rng.random((70, 1))
        found = tree.locate(hidden, reading)
        np.testing.assert_array_equal(found, one_by_one(tree, hidden, reading))
        counts = tree.level_counts(hidden, reading)
        for level in range(counts.shape[1]):
            want = found[:, tree.levels == level].sum(axis=1)
            np.testing.assert_array_equal(counts[:, level], want)


def test_levels_are_longest_ways_down():
    tree = uneven(0)
    level = np.zeros(60, int)
    for leaf in tree.leaves:
        node, height = leaf, 0
        while node >= 0:
            level[node] = max(level[node], height)
            node, height = tree.parents[node], height + 1
    np.testing.assert_array_equal(tree.levels, level)


@pytest.mark.parametrize("side", [1, 2, 4])
def test_the_pixels_of_a_quadtree_are_in_the_order_of_an_image(side):
    tree = Tree.quadtree(3)
    node = tree.leaves.reshape(8, 8)
    for _ in range(side.bit_length() - 1):
        node = tree.parents[node]
    blocks = node.reshape(8 // side, side, 8 // side, side).swapaxes(1, 2)
    blocks = blocks.reshape(-1, side * side)
    assert (blocks == blocks[:, :1]).all() and len(set(blocks[:, 0])) == len(blocks)


# Tables of Figure 4 on balanced binary trees: mean level of c, and the highest.
EIGHT = {1: (1, 1), 2: (8 / 7, 8 / 7), 3: (1.143, 1.286), 4: (1.190, 1.343)}
SIXTEEN = {1: (1, 1), 4: (1.105, 1.281), 8: (1.141, 1.495)}


@pytest.mark.parametrize("leaves, table", [(8, EIGHT), (16, SIXTEEN)])
def test_levels_over_all_masks_of_binary_trees(leaves, table):
    tree = Tree.regular(2, leaves.bit_length() - 1)
    for hidden, want in table.items():
        for count in {hidden, leaves - hidden}:  # the same on both sides of a half
            found = mean_levels(tree.level_counts(masks_of_size(leaves, count)))
            np.testing.assert_allclose(np.mean(found, axis=1), want, atol=1e-3)


def test_half_masks_that_share_the_root_alone():
    tree = Tree.regular(2, 3)
    c = tree.locate(masks_of_size(8, 4))
    alone = c[:, 0] & (c.sum(axis=1) == 1)
    assert round(100 * alone.mean(), 1) == 2.9


def test_the_frontier_rises_with_the_ratio():
    tree, want = Tree.regular(2, 4), {1: 1, 4: 1.14, 8: 1.34, 12: 1.71, 15: 2.5}
    for count, level in want.items():
        found, _ = mean_levels(tree.level_counts(masks_of_size(16, count), "frontier"))
        assert found.mean() == pytest.approx(level, abs=0.006)


RATIOS = {6: (1.048, 1.218), 16: (1.091, 1.735), 32: (1.120, 1.944)}
RATIOS |= {48: (1.093, 1.734), 58: (1.042, 1.201)}


def test_levels_of_random_masks_of_64_leaves():
    tree = Tree.regular(2, 6)
    for count, want in RATIOS.items():
        found = mean_levels(tree.level_counts(exact(5000, 64, count)))
        np.testing.assert_allclose(np.mean(found, axis=1), want, atol=0.025)


def test_units_raise_the_level():
    tree = Tree.regular(2, 6)
    # At ratio .75. The last three are exact: all masks of 8, 4 and 2 units count alike.
    for unit, want in {1: 1.093, 2: 2.091, 4: 3.107, 8: 29 / 7, 16: 5, 32: 6}.items():
        units = 64 // unit
        masks = exact(2000, units, -(-3 * units // 4)) if units > 8 else None
        if masks is None:
            masks = masks_of_size(units, max(1, 3 * units // 4))
        counts = tree.level_counts(masks.repeat(unit, axis=1))
        error = 1e-12 if units <= 8 else 0.02
        assert mean_levels(counts)[0].mean() == pytest.approx(want, abs=error)
        assert not counts[:, : unit.bit_length()].any()  # a theorem


def test_ratio_moves_the_size_of_c_on_a_quadtree():
    tree, sizes = Tree.quadtree(5), {0.1: 87.8, 0.5: 224.4, 0.9: 87.8, 0.25: 173.9}
    for ratio, size in sizes.items():
        counts = tree.level_counts(exact(300, 1024, round(1024 * ratio)))
        assert counts.sum(axis=1).mean() == pytest.approx(size, rel=0.012)
        assert mean_levels(counts)[0].mean() < 1.005


def test_trees_that_are_none_are_refused():
    with pytest.raises(ValueError, match="node 1 has the parent 5: want -1, or a node"):
        Tree(np.array([-1, 5]))
    with pytest.raises(ValueError, match="node 0 has the parent -2"):
        Tree(np.array([-2, 0]))
    for parents in ([1, 2, 1, -1], [0, -1], [-1, 0, 3, 4, 2, 1]):
        with pytest.raises(ValueError, match=r"node \d is its own ancestor") as error:
            Tree(np.array(parents))
        node = above = int(str(error.value).split()[1])
        for _ in parents:
            above = parents[above]
            if above == node:
                break
        assert above == node
    tree = Tree.regular(2, 2)
    with pytest.raises(ValueError, match="masks of 5 pixels: want 4, the leaves"):
        tree.locate(np.zeros((1, 5), bool))
    with pytest.raises(ValueError, match="reading='separator': want one of"):
        tree.locate(np.zeros((1, 4), bool), "separator")
