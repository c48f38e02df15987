# SPDX-License-Identifier: Apache-2.0
"""The estimated tree of images is the one that made them."""

import numpy as np
import pytest

from mim_jax.data.sources.hierarchy import Hierarchy
from mim_jax.theory.structure import agreement, correlations, edge, estimate


def patches_of(source: Hierarchy, count: int) -> np.ndarray:
    side, token = 2**source.levels, source.token
    images = np.stack([source[i]["image"] for i in range(count)])
    blocks = images.reshape(count, side, token, side, token, 3)
    return blocks.transpose(0, 1, 3, 2, 4, 5).reshape(count, side**2, -1)


@pytest.mark.parametrize("kind, images", [("cascade", 600), ("symbols", 900)])
def test_the_tree_of_a_source_is_found(kind, images):
    source = Hierarchy(kind=kind, levels=2, token=2, symbols=4)
    truth = source[0]["tree"].reshape(2, 16)
    found = estimate(patches_of(source, images), levels=2)
    np.testing.assert_array_equal(found.tree, truth)
    # Dimensions of a vector; of a symbol at most symbols - 1 contrasts.
    assert found.rank == 4 if kind == "cascade" else 1 <= found.rank <= 3
    # All edges of a level of the cascade are of one length, those of symbols are not.
    same = truth[0][:, None] == truth[0][None]
    if kind == "cascade":
        assert found.distances[same].max() < found.distances[~same].min()


def test_the_order_of_patches_does_not_matter():
    patches = patches_of(Hierarchy(kind="cascade", levels=2, token=2), 600)
    order = np.random.default_rng(0).permutation(16)
    one, two = estimate(patches, 2), estimate(patches[:, order], 2)
    for plain, mixed in zip(one.tree, two.tree, strict=True):
        assert agreement(mixed, plain[order]) == 1


def test_shifted_images_have_no_tree_in_place():
    source = Hierarchy(kind="cascade", levels=2, token=2, shift=True)
    found = estimate(patches_of(source, 600), levels=1)
    assert agreement(found.tree[0], Hierarchy(levels=2)[0]["tree"][0].ravel()) < 0.7


def test_correlations_are_those_of_gaussian_blocks():
    """A closed form: y = R x + s * noise has correlations 1 / sqrt(1 + s**2)."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20000, 3))
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    y = x @ turn + 0.75 * rng.normal(size=x.shape)
    z = rng.normal(size=x.shape)
    found = correlations(np.stack([x * [1, 10, 100], y + 5, z], axis=1))
    np.testing.assert_allclose(found[0, 1], 0.8, atol=0.02)
    assert (found[2, :2] < edge(20000, 3)).all()
    assert edge(20000, 3) < 0.03
    np.testing.assert_array_equal(found, found.transpose(1, 0, 2))


def test_distances_add_up_along_the_tree():
    """Through a middle patch: a chain x, y, z of Gaussian blocks."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40000, 2))
    y = 0.8 * x + 0.6 * rng.normal(size=x.shape)
    z = 0.5 * y + np.sqrt(0.75) * rng.normal(size=x.shape)
    far = estimate(np.stack([x, y, z, rng.normal(size=x.shape)], axis=1), 1).distances
    np.testing.assert_allclose(far[0, 1], -np.log(0.8), atol=0.02)
    np.testing.assert_allclose(far[0, 2], far[0, 1] + far[1, 2], atol=0.02)


def test_too_few_images_and_levels_that_are_not_there_are_refused():
    patches = np.zeros((20, 16, 12))
    with pytest.raises(
        ValueError, match="20 images for patches of 12 numbers: want at"
    ):
        estimate(patches, 2)
    with pytest.raises(ValueError, match="levels=3 of branching=4 above 16 patches"):
        estimate(np.zeros((30, 16, 12)), 3)
