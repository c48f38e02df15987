# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest

from mim_jax.ops.patches import Grid, sincos_2d


def test_closed_form_in_float64():
    table = sincos_2d(Grid(rows=3, cols=5, patch=16), 24)
    assert table.shape == (15, 24) and table.dtype == np.float64
    for place in range(15):
        row, col = divmod(place, 5)
        for half, position in enumerate((col, row)):  # the column comes first
            for i in range(6):
                angle = position * 10000 ** (-i / 6)
                sine, cosine = table[place, [12 * half + i, 12 * half + 6 + i]]
                assert math.isclose(sine, math.sin(angle), abs_tol=1e-15)
                assert math.isclose(cosine, math.cos(angle), abs_tol=1e-15)


def test_columns_are_in_the_first_half_and_rows_in_the_second():
    table = sincos_2d(Grid(rows=2, cols=3, patch=1), 8)
    origin, right, below = table[0], table[1], table[3]
    assert (right[:4] != origin[:4]).all() and (right[4:] == origin[4:]).all()
    assert (below[4:] != origin[4:]).all() and (below[:4] == origin[:4]).all()
    # Halves exchanged is the table of the transposed grid: MoCo v3's layout.
    turned = sincos_2d(Grid(rows=3, cols=2, patch=1), 8).reshape(3, 2, 8)
    expected = np.roll(turned.transpose(1, 0, 2).reshape(6, 8), 4, axis=1)
    np.testing.assert_array_equal(table, expected)


def test_a_width_that_cannot_be_quartered_is_refused():
    with pytest.raises(ValueError, match="width=18"):
        sincos_2d(Grid(2, 2, 16), 18)
