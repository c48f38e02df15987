# SPDX-License-Identifier: Apache-2.0
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.ops.patches import (
    Grid,
    grid_of,
    normalise_patches,
    patch_statistics,
    patchify,
    to_float,
    unpatchify,
)


def test_a_patch_is_a_square_in_the_order_row_column_channel():
    random = np.random.RandomState(0)
    images = random.randn(2, 6, 9, 5).astype(np.float32)
    patches = np.asarray(patchify(jnp.asarray(images), 3))
    assert patches.shape == (2, 6, 45)
    for place in range(6):
        row, col = divmod(place, 3)
        square = images[:, 3 * row : 3 * row + 3, 3 * col : 3 * col + 3]
        np.testing.assert_array_equal(patches[:, place], square.reshape(2, 45))
    back = unpatchify(jnp.asarray(patches), grid_of(6, 9, 3))
    np.testing.assert_array_equal(back, images)


def test_channels_are_last():
    image = jnp.broadcast_to(jnp.arange(3.0), (1, 4, 4, 3))
    np.testing.assert_array_equal(patchify(image, 4)[0, 0], np.tile(np.arange(3.0), 16))


def test_targets_have_unit_sample_variance():
    random = np.random.RandomState(0)
    patches = jnp.asarray(5 + 3 * random.randn(2, 4, 12), jnp.float32)
    target = np.asarray(normalise_patches(patches), np.float64)
    np.testing.assert_allclose(target.mean(axis=-1), 0, atol=1e-6)
    # Divisor n - 1; with divisor n it would be 1.044.
    np.testing.assert_allclose(target.std(axis=-1, ddof=1), 1, atol=1e-5)
    mean, deviation = patch_statistics(patches)
    np.testing.assert_allclose(target * deviation + mean, patches, atol=1e-5)


def test_a_flat_patch_is_finite():
    mean, deviation = patch_statistics(jnp.full((1, 1, 8), 7.0))
    assert mean[0, 0, 0] == 7
    np.testing.assert_allclose(deviation, 1e-3, rtol=1e-6)
    assert (normalise_patches(jnp.full((1, 1, 8), 7.0)) == 0).all()


def test_a_grid_counts_rows_then_columns():
    assert grid_of(32, 48, 16) == Grid(rows=2, cols=3, patch=16)
    assert grid_of(32, 48, 16).size == 6


@pytest.mark.parametrize(
    "height, width, patch", [(33, 48, 16), (32, 47, 16), (8, 16, 16), (16, 16, 0)]
)
def test_sides_that_do_not_fit_are_refused(height, width, patch):
    with pytest.raises(ValueError, match=f"{height}x{width} with patch={patch}"):
        grid_of(height, width, patch)


def test_bytes_become_shares():
    images = jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1)
    found = np.asarray(to_float(images)).ravel()
    np.testing.assert_allclose(found, np.arange(256) / 255, rtol=3e-7)
    assert found[0] == 0 and found[255] == 1
