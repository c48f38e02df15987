# SPDX-License-Identifier: Apache-2.0
"""Rectangles: the count is exact, and what is hidden is made of few pieces."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage import measure

from mim_jax.maskings.block import Block
from mim_jax.maskings.random import Random
from mim_jax.ops.patches import Grid

GRID = Grid(14, 14, 16)


@settings(max_examples=500)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 99))
def test_counts_are_exact(rows, cols, percent):
    visible = rows * cols * (100 - percent) // 100
    masking, grid = Block(ratio=percent / 100, least=1), Grid(rows, cols, 16)
    if 0 < visible < rows * cols:
        assert masking.visible_count(grid) == visible
    else:
        with pytest.raises(ValueError, match="want at least one visible and one"):
            masking.visible_count(grid)


def tables(masking, count: int) -> np.ndarray:
    """Hidden patches of some images as tables of 14 x 14."""
    keys = jax.random.split(jax.random.key(0), count)
    mask = jax.jit(masking, static_argnums=1)(keys, GRID)
    return np.asarray(mask.hidden).reshape(-1, 14, 14)


def pieces(masking) -> float:
    """Connected hidden regions of an image, on average over 64."""
    found = [measure.label(t, connectivity=1).max() for t in tables(masking, 64)]
    return float(np.mean(found))


def test_hidden_patches_lie_together():
    assert pieces(Block(ratio=0.4)) < 5 < 15 < pieces(Random(ratio=0.4))


def test_rectangles_land_everywhere():
    # Large rectangles cover the middle more often; corners must still be reached.
    table = tables(Block(ratio=0.4), 2000).mean(axis=0)
    assert table.min() > 0.03 and np.isclose(table.mean(), 79 / 196)
    # Flipped or turned, the same chances: 0.011 is the deviation of one share.
    for other in (table[::-1], table[:, ::-1], table.T):
        assert np.abs(table - other).max() < 0.08


def test_the_first_rectangle_is_whole():
    # One rectangle as large as the count: hidden is that rectangle, up to rounding.
    masking = Block(ratio=0.25, least=49, rectangles=1, aspect=1.0)
    for table in tables(masking, 16):
        rows, cols = np.flatnonzero(table.any(1)), np.flatnonzero(table.any(0))
        assert table.sum() == 49 and len(rows) == len(cols) == 7
        assert np.ptp(rows) == np.ptp(cols) == 6


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(ratio=1.0), "ratio=1.0: want 0 < ratio < 1"),
        (dict(least=0), "least=0: want 1 <= least"),
        (dict(rectangles=0), "rectangles=0: want 1 <= rectangles"),
        (dict(aspect=1.5), "aspect=1.5: want 0.001 <= aspect <= 1"),
    ],
)
def test_fields_out_of_range(fields, message):
    with pytest.raises(ValueError) as caught:
        Block(**fields)
    assert message in str(caught.value)


def test_a_rectangle_must_fit_into_what_is_hidden():
    with pytest.raises(ValueError, match="least=16: want at most the 7 patches that"):
        Block(ratio=0.4).visible_count(Grid(4, 4, 16))
