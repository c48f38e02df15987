# SPDX-License-Identifier: Apache-2.0
"""Weights by distance from what is visible: against all pairs of pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.maskings.random import Random
from mim_jax.ops.boundary import interior, interior_errors
from mim_jax.ops.masking import Mask
from mim_jax.ops.patches import Grid

GRID = Grid(4, 6, 3)


def masks(count=4, **fields):
    keys = jax.random.split(jax.random.key(0), count)
    return Random(**fields)(keys, GRID)


def distances(hidden, grid=GRID):
    """Of each pixel from the nearest visible one, from all pairs of pixels."""
    rows, cols = grid.rows * grid.patch, grid.cols * grid.patch
    places = np.stack(np.divmod(np.arange(rows * cols), cols), axis=1)
    patches = places // grid.patch @ [grid.cols, 1]
    shown = places[~np.asarray(hidden)[patches]]
    apart = np.abs(places[:, None] - shown[None]).max(axis=2)
    return apart.min(axis=1).reshape(rows, cols)


def by_patch(image, drop, grid=GRID):
    patch = grid.patch
    rows, cols = np.divmod(np.asarray(drop), grid.cols)
    return np.stack(
        [
            image[patch * r : patch * (r + 1), patch * c : patch * (c + 1)].ravel()
            for r, c in zip(rows, cols, strict=True)
        ]
    )


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("soft", [False, True])
def test_weights_are_those_of_distances(depth, soft):
    mask = masks(ratio=0.75, unit=6)
    found = np.asarray(interior(mask, GRID, depth, soft))
    for row, hidden, drop in zip(found, mask.hidden, mask.drop, strict=True):
        distance = by_patch(distances(np.asarray(hidden)), drop)
        want = distance > depth
        if soft:
            want = np.minimum(distance, depth + 1) / (depth + 1)
        np.testing.assert_allclose(row, want, atol=1e-6)
        assert 0 < want.mean() < 1 or depth == 4


def test_an_isolated_unit_keeps_its_inner_square():
    grid = Grid(5, 5, 4)
    drop = jnp.asarray([[12]], jnp.int32)  # the patch in the middle
    keep = jnp.asarray([[i for i in range(25) if i != 12]], jnp.int32)
    weights = interior(Mask(keep, drop), grid, 1, False)
    square = np.zeros((4, 4))
    square[1:3, 1:3] = 1
    np.testing.assert_array_equal(weights[0, 0].reshape(4, 4), square)


def test_the_border_of_the_image_is_no_boundary():
    grid = Grid(1, 3, 2)
    mask = Mask(jnp.asarray([[2]], jnp.int32), jnp.asarray([[0, 1]], jnp.int32))
    weights = interior(mask, grid, 1, False)
    assert weights.tolist() == [[[1, 1, 1, 1], [1, 0, 1, 0]]]


def test_errors_are_weighted_pixel_by_pixel():
    rng = np.random.default_rng(0)
    prediction, target = rng.standard_normal((2, 3, 5, 12)).astype(np.float32)
    weights = rng.random((3, 5, 4)).astype(np.float32)
    errors, sums = interior_errors(*map(jnp.asarray, (prediction, target, weights)))
    want = np.zeros((3, 5))
    for b, m, pixel, channel in np.ndindex(3, 5, 4, 3):
        error = (
            prediction[b, m, 3 * pixel + channel] - target[b, m, 3 * pixel + channel]
        )
        want[b, m] += weights[b, m, pixel] * error**2 / 3
    np.testing.assert_allclose(errors, want, rtol=1e-5)
    np.testing.assert_allclose(sums, weights.sum(axis=-1), rtol=1e-6)
