# SPDX-License-Identifier: Apache-2.0
"""Grid masking: which grids it fits. What it draws is in masking_test.py."""

import pytest

from mim_jax.maskings.grid import GridMasking
from mim_jax.ops.patches import Grid


@pytest.mark.parametrize("cell, kept", [(2, 36), (3, 16), (4, 9), (6, 4)])
def test_counts_are_exact(cell, kept):
    assert GridMasking(cell=cell).visible_count(Grid(12, 12, 16)) == kept


def test_a_cell_must_tile_the_grid():
    with pytest.raises(ValueError) as caught:
        GridMasking(cell=4).visible_count(Grid(14, 12, 16))
    assert str(caught.value) == (
        "cell=4 does not tile a grid of 14x12 patches: choose a divisor of both"
    )


def test_a_cell_has_several_patches():
    with pytest.raises(ValueError, match="^cell=1: want 2 <= cell <= 16384$"):
        GridMasking(cell=1)
