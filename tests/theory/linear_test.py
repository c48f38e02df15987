# SPDX-License-Identifier: Apache-2.0
"""The linear masked autoencoder in closed form: by hand, and the published table."""

import numpy as np
import pytest

from mim_jax.theory import Tree
from mim_jax.theory.linear import cascade, code, prediction, recovered

KEEP = 0.9


def masks(side, unit, hidden, count, seed=0):
    """Random masks of side x side pixels that hide so many units."""
    units = side // unit
    order = np.random.default_rng(seed).random((count, units**2)).argsort(axis=1)
    cells = (order < hidden).reshape(-1, units, 1, units, 1)
    return cells.repeat(unit, axis=2).repeat(unit, axis=4).reshape(count, side**2)


def mean_of(levels, unit, hidden, width, count):
    """R2 by node, mean over masks."""
    tree = Tree.quadtree(levels)
    found = [
        recovered(tree, KEEP, mask, width)
        for mask in masks(2**levels, unit, hidden, count)
    ]
    return tree, np.mean(found, axis=0)


def root_to_level_1(levels, unit, hidden, count=1):
    tree, found = mean_of(levels, unit, hidden, None, count)
    return found[0] / found[tree.levels == 1].mean()


def test_covariances_are_those_of_a_tree():
    tree = Tree.quadtree(2)
    rows = cascade(tree, KEEP)
    for one in range(len(rows)):
        for other in range(len(rows)):
            ways = [[one], [other]]
            for way in ways:
                while tree.parents[way[-1]] >= 0:
                    way.append(tree.parents[way[-1]])
            apart = len(set(ways[0]) ^ set(ways[1]))
            want = KEEP**apart  # each edge of the way between them
            assert rows[one] @ rows[other] == pytest.approx(want, abs=1e-12)


def test_one_parent_and_four_pixels_by_hand():
    tree, a = Tree.quadtree(1), KEEP
    for visible in (1, 2, 3):
        hidden = np.arange(4) >= visible
        rows = cascade(tree, a)
        leaves = rows[tree.leaves]
        guess = prediction(leaves[hidden], leaves[~hidden])
        # Given v pixels, each hidden one is expected at a**2 / (1 + (v - 1) a**2)
        # times their sum.
        each = a**2 / (1 + (visible - 1) * a**2)
        want = np.tile(each * leaves[~hidden].sum(axis=0), (4 - visible, 1))
        np.testing.assert_allclose(guess, want, atol=1e-12)
        held = recovered(tree, a, hidden, None)
        assert held[0] == pytest.approx(visible * a**2 / (1 + (visible - 1) * a**2))


def test_the_best_prediction_leaves_no_correlation_with_what_is_visible():
    tree = Tree.quadtree(3)
    rows = cascade(tree, KEEP)[tree.leaves]
    (hidden,) = masks(8, 1, 40, 1)
    rest = rows[hidden] - prediction(rows[hidden], rows[~hidden])
    np.testing.assert_allclose(rest @ rows[~hidden].T, 0, atol=1e-10)


# Cells in which all masks count alike, since units can change places: exact.
EXACT = {(8, 1): 0.899, (8, 2): 0.856, (8, 3): 0.748}
EXACT |= {(4, 1): 0.828, (4, 15): 0.609, (2, 1): 0.696, (2, 63): 0.502}


@pytest.mark.parametrize("unit, hidden", EXACT)
def test_how_much_of_the_root_a_code_of_four_holds(unit, hidden):
    _, found = mean_of(4, unit, hidden, 4, 1)
    assert found[0] == pytest.approx(EXACT[unit, hidden], abs=5e-4)


def test_how_selective_a_code_is_for_the_root():
    for (unit, hidden), want in {(4, 1): 1.59, (4, 15): 1.57, (2, 63): 1.57}.items():
        assert root_to_level_1(4, unit, hidden) == pytest.approx(want, abs=5e-3)


def test_middle_ratios_recover_the_root_best_and_units_emphasise_it():
    for unit in (1, 2):
        units = (8 // unit) ** 2
        counts = [max(1, round(units * r)) for r in (0.02, 0.5, 0.98)]
        low, middle, high = (mean_of(3, unit, n, 4, 12)[1] for n in counts)
        assert low[0] < middle[0] > high[0]
        assert all(0 <= x.min() and x.max() <= 1 + 1e-9 for x in (low, middle, high))
    emphasis = [root_to_level_1(3, u, 48 // u**2, 12) for u in (1, 2, 4)]
    assert emphasis == sorted(emphasis)


def test_a_code_is_orthonormal_and_of_the_width_that_it_is_given():
    tree = Tree.quadtree(2)
    rows = cascade(tree, KEEP)[tree.leaves]
    guess = prediction(rows[::2], rows[1::2])
    for width, want in ((3, 3), (None, np.linalg.matrix_rank(guess, tol=1e-5))):
        held = code(guess, width)
        np.testing.assert_allclose(held @ held.T, np.eye(want), atol=1e-12)


TABLE = {  # unit: ratio: (R2 of the root at width 4, its ratio to level 1)
    1: {0.1: (0.908, 1.16), 0.25: (0.918, 1.05), 0.5: (0.919, 1.02)},
    2: {0.1: (0.890, 1.35), 0.25: (0.913, 1.21), 0.5: (0.912, 1.17)},
    4: {0.1: (0.870, 1.52), 0.25: (0.895, 1.44), 0.5: (0.895, 1.37)},
}
TABLE[1] |= {0.75: (0.914, 1.10), 0.9: (0.894, 1.23)}
TABLE[2] |= {0.75: (0.893, 1.26), 0.9: (0.822, 1.42)}
TABLE[4] |= {0.75: (0.842, 1.43), 0.9: (0.747, 1.51)}


@pytest.mark.slow
@pytest.mark.parametrize("unit", TABLE)
def test_the_whole_table(unit):
    units = (16 // unit) ** 2
    for ratio, (root, emphasis) in TABLE[unit].items():
        _, found = mean_of(4, unit, round(units * ratio), 4, 30)
        assert found[0] == pytest.approx(root, abs=0.012)
        found = root_to_level_1(4, unit, round(units * ratio), 30)
        assert found == pytest.approx(emphasis, abs=0.03)
