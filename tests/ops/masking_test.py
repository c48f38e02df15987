# SPDX-License-Identifier: Apache-2.0
"""Index functions of masks against slow re-implementations in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mim_jax.ops import masking
from mim_jax.ops.patches import Grid

# Few shapes, so that 1,000 settings do not mean 1,000 compilations.
SHAPES = ((2, 3, 1), (6, 4, 2), (5, 7, 2), (7, 5, 3), (3, 9, 3), (4, 4, 5))


def order_of(scores: np.ndarray, rows: int, cols: int, side: int) -> list[int]:
    """Long-sequence MAE in words: permute the units, write out the patches of each
    column by column, cross out those outside the grid."""
    across = (cols + side - 1) // side
    order = []
    for unit in sorted(range(len(scores)), key=lambda unit: (scores[unit], unit)):
        top, left = unit // across * side, unit % across * side
        for col in range(left, left + side):
            for row in range(top, top + side):
                if row < rows and col < cols:
                    order.append(row * cols + col)
    return order


@settings(max_examples=1000)
@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 2**32 - 1))
def test_order_units_is_the_slow_order(shape, seed):
    rows, cols, side = shape
    units = -(-rows // side) * -(-cols // side)
    # Small integers: ties are common, and must not split a unit.
    scores = np.random.default_rng(seed).integers(0, 4, (2, units), np.int32)
    got = masking.order_units(jnp.asarray(scores), Grid(rows, cols, 8), side)
    assert got.dtype == jnp.int32
    assert got.tolist() == [order_of(row, rows, cols, side) for row in scores]


def test_from_scores_is_numpys_stable_argsort():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 9, (4, 30)).astype(np.float32)  # with ties
    mask = masking.from_scores(jnp.asarray(noise), keep=7)
    order = np.argsort(noise, axis=1, kind="stable")
    np.testing.assert_array_equal(mask.keep, order[:, :7])
    np.testing.assert_array_equal(mask.drop, order[:, 7:])


@pytest.mark.parametrize("keep", [-1, 0, 5, 6])
def test_a_mask_sees_something_and_hides_something(keep):
    with pytest.raises(ValueError, match=f"keep={keep} of 5 patches: want 0 < keep"):
        masking.from_scores(jnp.zeros((1, 5)), keep)


def test_hidden_is_true_exactly_at_drop():
    mask = masking.from_scores(jnp.asarray([[3, 0, 1, 2], [0, 1, 2, 3]]), keep=1)
    expected = [[True, False, True, True], [False, True, True, True]]
    assert mask.hidden.tolist() == expected


@settings(max_examples=100)
@given(st.sampled_from([2, 7]), st.integers(0, 2**32 - 1))
def test_from_hidden_hides_what_it_is_told(count, seed):
    rng = np.random.default_rng(seed)
    hidden = np.arange(count)[None] < rng.integers(1, count)
    hidden = rng.permuted(np.repeat(hidden, 3, axis=0), axis=1)
    mask = masking.from_hidden(hidden)
    np.testing.assert_array_equal(mask.hidden, hidden)
    rows = np.concatenate([mask.keep, mask.drop], axis=1)
    np.testing.assert_array_equal(np.sort(rows, axis=1), [np.arange(count)] * 3)


@pytest.mark.parametrize(
    "hidden, reason",
    [
        ([[True, False, False], [True, True, False]], "range from 1 to 2 of 3"),
        ([[False, False, False]], "range from 0 to 0 of 3"),
        ([[True, True, True]], "range from 3 to 3 of 3"),
    ],
)
def test_from_hidden_refuses_unequal_or_empty_sides(hidden, reason):
    with pytest.raises(ValueError, match=f"{reason}: want one count for all images"):
        masking.from_hidden(np.asarray(hidden))


def test_complement_exchanges_visible_and_hidden():
    mask = masking.from_scores(jnp.asarray([[3, 0, 1, 2, 4]]), keep=2)
    other = masking.complement(mask)
    np.testing.assert_array_equal(other.hidden, ~mask.hidden)
    assert other.keep.shape == (1, 3)
    np.testing.assert_array_equal(masking.complement(other).hidden, mask.hidden)


def test_unshuffle_restores_grid_order():
    values = jnp.arange(2 * 6 * 2, dtype=jnp.float32).reshape(2, 6, 2)
    mask = masking.from_scores(jax.random.uniform(jax.random.key(0), (2, 6)), keep=2)
    parts = [masking.take(values, mask.keep), masking.take(values, mask.drop)]
    restored = masking.unshuffle(jnp.concatenate(parts, axis=1), mask)
    np.testing.assert_array_equal(restored, values)
    np.testing.assert_array_equal(parts[0][1], values[1, np.asarray(mask.keep[1])])
