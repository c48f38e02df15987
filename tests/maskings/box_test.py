# SPDX-License-Identifier: Apache-2.0
"""The same rectangle of every image is hidden."""

import jax
import pytest

from mim_jax.maskings.box import Box
from mim_jax.ops.patches import Grid

GRID = Grid(3, 5, 4)


def test_the_box_is_hidden_and_nothing_else():
    masking = Box(top=1, left=2, rows=2, cols=3)
    mask = masking(jax.random.split(jax.random.key(0), 2), GRID)
    # Rows 1 and 2, columns 2 to 4, of five columns.
    assert sorted(mask.drop[0].tolist()) == [7, 8, 9, 12, 13, 14]
    assert mask.hidden[0].tolist() == mask.hidden[1].tolist()
    assert masking.visible_count(GRID) == 9


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(top=2, rows=2), "ends at row 4 and column 1 of 3 x 5 patches"),
        (dict(left=5), "ends at row 1 and column 6 of 3 x 5 patches"),
        (dict(rows=3, cols=5), "hides all patches: want fewer rows or cols"),
    ],
)
def test_a_box_that_does_not_fit_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Box(**fields).visible_count(GRID)
