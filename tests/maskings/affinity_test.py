# SPDX-License-Identifier: Apache-2.0
"""Masks along what the encoder relates, and along regions that look alike."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.cluster.hierarchy import cut_tree, ward
from scipy.sparse import csgraph, csr_matrix
from tiny import tree_of

from mim_jax import config
from mim_jax.data.examples.regions import Regions, region_tree
from mim_jax.data.geometry import Geometry
from mim_jax.data.sources.hierarchy import Hierarchy
from mim_jax.maskings.affinity import Affinity
from mim_jax.maskings.base import Masking
from mim_jax.ops.patches import Grid
from mim_jax.plan import Plan

GRID = Grid(4, 4, 2)
SQUARES = np.repeat(np.repeat(np.arange(4).reshape(2, 2), 2, axis=0), 2, axis=1)


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def told(tokens):
    """An objective whose encoder gives these tokens, after a class token."""
    first = jnp.zeros_like(tokens[:, :1])
    return types.SimpleNamespace(
        encode=lambda params, images: (jnp.concatenate([first, tokens], axis=1), {})
    )


def refreshed(masking, memory, tokens):
    batch = {"image": jnp.zeros((len(tokens), 8, 8, 1), jnp.uint8)}
    return masking.refresh(memory, told(tokens), {}, batch, keys(len(tokens)))


def test_affinity_is_the_cosine_of_what_changes_between_images():
    tokens = np.random.default_rng(0).normal(size=(50, 16, 3)).astype(np.float32)
    masking = Affinity(groups=4, decay=0.25)
    found = refreshed(masking, jnp.eye(16), jnp.asarray(tokens + 5))
    apart = (tokens - tokens.mean(axis=0)).transpose(1, 0, 2).reshape(16, -1)
    cosine = [[a @ b / np.sqrt(a @ a * (b @ b)) for b in apart] for a in apart]
    np.testing.assert_allclose(
        found, 0.25 * np.eye(16) + 0.75 * np.array(cosine), atol=1e-5
    )


def test_positions_that_change_together_are_hidden_together():
    masking = Affinity(ratio=0.5, groups=2)
    related = jnp.asarray(SQUARES.ravel()[:, None] == SQUARES.ravel()[None], "float32")

    def whole(memory):  # share of squares that are hidden as a whole or not at all
        hidden = masking(keys(200), GRID, memory=memory).hidden
        parts = [np.asarray(hidden)[:, SQUARES.ravel() == one] for one in range(4)]
        return np.mean([part.all(axis=1) | ~part.any(axis=1) for part in parts])

    # A random half of 16: 2 * C(12, 4) / C(16, 8) of the squares.
    chance, deviation = 0.077, 0.0094
    assert abs(whole(masking.first_memory(GRID)) - chance) < 4.5 * deviation
    assert whole(related) > 0.35


def tiny(**changes):
    made = tree_of("mae", **changes)
    with made.objective.unlocked():
        made.objective.masking = config.choose(Masking, "affinity")
    made.objective.color_jitter = "none"
    return made


def test_a_run_keeps_the_affinities_in_its_state():
    plan = Plan.of(tiny(), jax.devices()[:1])
    assert plan.abstract_state().memory.shape == (16, 16)
    made = tiny()
    made.objective.masking.groups = 17
    with pytest.raises(config.ConfigError, match="groups=17 of 16 patches"):
        Plan.of(made, jax.devices()[:1])


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (24, 16, 3)).astype(np.uint8)


@pytest.mark.parametrize("seed", range(5))
def test_regions_are_connected_and_lie_in_those_above(seed):
    tree = region_tree(picture(seed), 4, 3)
    assert tree.shape == (3, 6, 4) and tree.dtype == np.int32
    counts = [len(np.unique(level)) for level in tree]
    assert counts == [6, 2, 1]
    for level, number in zip(tree, counts, strict=True):
        firsts = [np.flatnonzero(level == one)[0] for one in range(number)]
        assert firsts == sorted(firsts)
        for region in range(number):
            inside = np.flatnonzero(level.ravel() == region)
            rows, cols = np.divmod(inside, 4)
            apart = abs(rows[:, None] - rows) + abs(cols[:, None] - cols)
            assert csgraph.connected_components(csr_matrix(apart == 1))[0] == 1
    for low, high in zip(tree, tree[1:], strict=False):
        pairs = {*zip(low.ravel().tolist(), high.ravel().tolist(), strict=True)}
        assert len(pairs) == low.max() + 1


def test_on_a_line_without_gaps_it_is_wards_clustering():
    """Independent: SciPy's, where neighbours may be merged alone because the image gets
    brighter from left to right."""
    levels = np.sort(np.random.default_rng(1).choice(256, 16, replace=False))
    image = np.repeat(np.repeat(levels[None, :, None], 2, axis=0), 2, axis=1)
    found = region_tree(image.astype(np.uint8), 2, 1)[0, 0]
    want = cut_tree(ward(levels[:, None].astype(float)), 4)[:, 0]
    assert len(np.unique(found)) == 4
    assert len({*zip(found.tolist(), want.tolist(), strict=True)}) == 4


def test_a_run_with_regions_has_masks_along_them():
    made = tree_of("mae")
    with made.objective.unlocked():
        made.objective.masking = config.choose(Masking, "subtrees")
    with made.data.unlocked():
        made.data.examples = config.choose(type(Regions()).__mro__[1], "regions")
    made.data.examples.patch = 2
    made.objective.color_jitter = "none"
    plan = Plan.of(made, jax.devices()[:1])
    assert plan.reads == ("image", "tree")
    assert plan.abstract_batch()["tree"].shape[1:] == (2, 4, 4)


def test_sizes_that_do_not_fit_are_refused():
    data = Geometry(source=Hierarchy(), image_size=(32, 32))
    with pytest.raises(ValueError, match="the source declares a field tree already"):
        Regions(patch=4).fields(data)
    with pytest.raises(ValueError, match="patch=5 of images of 32x32 pixels"):
        Regions(patch=5).fields(data)
