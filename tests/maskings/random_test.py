# SPDX-License-Identifier: Apache-2.0
"""Random units: exact counts, whole units, the listed cuts of long-sequence MAE."""

import fractions
import functools
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mim_jax.maskings.random import Random
from mim_jax.ops.patches import Grid

TOLERANCE = fractions.Fraction(1, 10**6)


def visible_of(total: int, ratio: str) -> int:
    """floor(total * (1 - ratio) + 1e-6) in exact arithmetic, the ratio as written."""
    return math.floor(total * (1 - fractions.Fraction(ratio)) + TOLERANCE)


def units_of(hidden: np.ndarray, grid: Grid, side: int) -> list[list[bool]]:
    """The hidden flags of the patches of each unit, column by column."""
    table = hidden.reshape(grid.rows, grid.cols)
    return [
        table[top : top + side, left : left + side].T.ravel().tolist()
        for top in range(0, grid.rows, side)
        for left in range(0, grid.cols, side)
    ]


# As people write them: one decimal, or four.
ratios = st.integers(1, 9).map(lambda n: f"0.{n}") | st.integers(1, 9999).map(
    lambda n: f"0.{n:04d}"
)


@settings(max_examples=1000)
@given(
    st.integers(1, 64),
    st.integers(1, 64),
    st.integers(1, 32),
    st.integers(1, 8),
    ratios,
    st.sampled_from(["round", "allow"]),
)
def test_counts_are_exact(rows, cols, patch, side, ratio, partial_units):
    masking = Random(ratio=float(ratio), unit=side * patch, partial_units=partial_units)
    grid = Grid(rows, cols, patch)
    size = side * side if partial_units == "round" else 1
    visible = visible_of(rows * cols // size, ratio)
    tiles = rows % side == 0 and cols % side == 0
    fits = side < max(rows, cols) and (tiles or partial_units == "allow")
    if fits and 0 < visible < rows * cols // size:
        assert masking.visible_count(grid) == visible * size
    else:
        with pytest.raises(ValueError, match="want|choose"):
            masking.visible_count(grid)


# Few shapes, so that 1,000 settings do not mean 1,000 compilations.
SHAPES = ((3, 3, 1), (2, 5, 1), (4, 6, 2), (6, 3, 3), (5, 3, 2), (4, 7, 3))


@settings(max_examples=1000)
@given(
    st.sampled_from(SHAPES),
    st.sampled_from([1, 8, 14]),
    ratios,
    st.sampled_from(["round", "allow"]),
    st.integers(0, 2**32 - 1),
)
def test_masks_are_partitions_into_units(shape, patch, ratio, partial_units, seed):
    rows, cols, side = shape
    grid = Grid(rows, cols, patch)
    masking = Random(ratio=float(ratio), unit=side * patch, partial_units=partial_units)
    try:
        kept = masking.visible_count(grid)
    except ValueError:
        return
    batch = 2
    mask = masking(keys_of(seed, batch), grid)
    keep, drop = np.asarray(mask.keep), np.asarray(mask.drop)
    assert keep.shape == (batch, kept)
    for i in range(batch):
        assert sorted([*keep[i], *drop[i]]) == list(range(grid.size))
        hidden = np.isin(np.arange(grid.size), drop[i])
        units = units_of(hidden, grid, side)
        cut = [unit for unit in units if 0 < sum(unit) < len(unit)]
        if partial_units == "round":
            assert cut == []
        else:
            assert len(cut) <= 1
            assert all(unit == sorted(unit) for unit in cut)  # visible ones first


@functools.cache
def _split(batch: int):
    return jax.jit(lambda seed: jax.random.split(jax.random.key(seed), batch))


def keys_of(seed: int, batch: int):
    return _split(batch)(np.uint32(seed))


@pytest.mark.parametrize(
    "side, ratio, full, rest",
    [(32, 0.75, 12, 4), (32, 0.9, 4, 14), (16, 0.9, 19, 2), (16, 0.75, 49, 0)],
)
def test_partial_units_keep_the_listed_counts(side, ratio, full, rest):
    # Patch 8 on 224 pixels, as util/long_seq_patch_loader.py of long-sequence MAE.
    grid, patches = Grid(28, 28, 8), (side // 8) ** 2
    masking = Random(ratio=ratio, unit=side, partial_units="allow")
    mask = masking(keys_of(0, 4), grid)
    for hidden in np.asarray(mask.hidden):
        units = units_of(hidden, grid, side // 8)
        visible = sorted((patches - sum(unit) for unit in units), reverse=True)
        expected = [patches] * full + [rest]
        assert visible[: full + 1] == expected and not any(visible[full + 1 :])
        (cut,) = [unit for unit in units if 0 < sum(unit) < patches] or [[]]
        assert cut == sorted(cut)  # column by column from the left


def test_units_over_the_border_are_as_likely_as_others():
    # 5 x 5 patches in units of 2: the last row and column of units are narrow.
    masking = Random(ratio=0.5, unit=16, partial_units="allow")
    grid = Grid(5, 5, 8)
    hidden = np.asarray(masking(keys_of(1, 2000), grid).hidden)
    first = [units_of(row, grid, 2) for row in hidden]
    whole = np.array([[not any(unit) for unit in units] for units in first])
    assert whole.mean(axis=0).min() > 0.3 and whole.mean(axis=0).max() < 0.7


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9])
def test_decimal_ratios_are_meant_as_written(ratio):
    # In floats 10 * (1 - 0.9) is 0.9999999999999998.
    assert Random(ratio=ratio).visible_count(Grid(2, 5, 16)) == 10 - round(10 * ratio)


@pytest.mark.parametrize(
    "grid, ratio, hidden",
    [
        (Grid(14, 14, 16), 0.1, 20),
        (Grid(14, 14, 16), 0.25, 49),
        (Grid(14, 14, 16), 0.5, 98),
        (Grid(14, 14, 16), 0.75, 147),
        (Grid(14, 14, 16), 0.9, 177),
        (Grid(28, 28, 8), 0.75, 588),
        (Grid(7, 7, 32), 0.75, 37),
    ],
)
def test_counts_of_the_usual_grids(grid, ratio, hidden):
    assert grid.size - Random(ratio=ratio).visible_count(grid) == hidden


@pytest.mark.parametrize("ratio", [-0.1, 0.0, 1.0, 1.5, float("nan")])
def test_ratio_is_a_share(ratio):
    with pytest.raises(ValueError, match=f"^ratio={ratio}: want 0 < ratio < 1$"):
        Random(ratio=ratio)


@pytest.mark.parametrize(
    "fields, grid, message",
    [
        (
            dict(unit=24),
            Grid(14, 14, 16),
            "unit=24 pixels with a ViT patch of 16: want a multiple of the patch, "
            "e.g. 16",
        ),
        (
            dict(unit=64),
            Grid(14, 14, 16),
            "unit=64 pixels does not tile an image of 224x224: choose a divisor of "
            "both sides, or partial_units='allow'",
        ),
        (
            dict(unit=112, ratio=0.9),
            Grid(14, 14, 16),
            "ratio=0.9 leaves 0 of 4 units visible: want at least one visible and "
            "one hidden, 1 <= 4 * (1 - ratio) < 4",
        ),
        (
            dict(ratio=1e-9),
            Grid(4, 4, 16),
            "ratio=1e-09 leaves 16 of 16 units visible: want at least one visible "
            "and one hidden, 1 <= 16 * (1 - ratio) < 16",
        ),
        (
            dict(unit=64, partial_units="allow"),
            Grid(4, 4, 16),
            "unit=64 pixels covers an image of 64x64, so that every mask would be the "
            "same: want a smaller one",
        ),
    ],
)
def test_what_does_not_fit_says_what_would(fields, grid, message):
    with pytest.raises(ValueError) as caught:
        Random(**fields).visible_count(grid)
    assert str(caught.value) == message


def test_unit_is_positive():
    with pytest.raises(ValueError, match="^unit=0: want 1 <= unit <= 16384$"):
        Random(unit=0)
