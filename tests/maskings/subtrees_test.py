# SPDX-License-Identifier: Apache-2.0
"""Masks along a hierarchy that the example states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tree_of

from mim_jax import config
from mim_jax.data.sources.base import Source
from mim_jax.data.sources.hierarchy import Hierarchy
from mim_jax.maskings.base import Masking
from mim_jax.maskings.subtrees import Subtrees
from mim_jax.ops.patches import Grid
from mim_jax.plan import Plan
from mim_jax.theory import Tree
from mim_jax.theory.trees import mean_levels

GRID = Grid(8, 8, 4)


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def trees(count, shift=True):
    source = Hierarchy(shift=shift)
    return np.stack([source[i]["tree"] for i in range(count)])


@pytest.mark.parametrize("level, ratio", [(1, 0.75), (2, 0.5), (2, 0.75)])
def test_what_a_latent_makes_is_hidden_together(level, ratio):
    tree = trees(40)
    masking = Subtrees(ratio=ratio, level=level)
    hidden = np.asarray(masking(keys(40), GRID, tree=jnp.asarray(tree)).hidden)
    for row, above in zip(hidden, tree[:, level - 1].reshape(40, 64), strict=True):
        whole = [row[above == latent] for latent in np.unique(above)]
        assert all(part.all() or not part.any() for part in whole)
        assert sum(part.all() for part in whole) == round(ratio * len(whole))
    # Every latent is hidden equally often.
    counts = [
        [row[above == latent].all() for latent in np.unique(above)]
        for row, above in zip(hidden, tree[:, level - 1].reshape(40, 64), strict=True)
    ]
    share = np.mean(counts, axis=0)
    assert np.abs(share - ratio).max() < 4.5 * np.sqrt(ratio * (1 - ratio) / 40)


def test_a_latent_is_cut_where_the_ratio_wants_it():
    masking = Subtrees(ratio=0.6, level=2)
    hidden = masking(keys(60), GRID, tree=jnp.asarray(trees(60))).hidden
    hidden = np.asarray(hidden)
    assert (hidden.sum(axis=1) == 64 - masking.visible_count(GRID)).all()
    above = trees(60)[:, 1].reshape(60, 64)
    sizes = [
        sorted(row[one == latent].sum() for latent in range(4))
        for row, one in zip(hidden, above, strict=True)
    ]
    assert sizes == [[0, 7, 16, 16]] * 60
    # Which of a latent's patches these are is random.
    parts = {
        tuple(np.flatnonzero(row[one == latent]))
        for row, one in zip(hidden, above, strict=True)
        for latent in range(4)
        if row[one == latent].sum() == 7
    }
    assert len(parts) > 50


def test_aligned_masks_share_latents_above_their_level():
    tree = Tree.quadtree(3)
    for level in (1, 2):
        masking = Subtrees(ratio=0.5, level=level)
        hidden = masking(keys(50), GRID, tree=jnp.asarray(trees(50, False))).hidden
        counts = tree.level_counts(np.asarray(hidden))
        assert not counts[:, : level + 1].any()
        assert mean_levels(counts)[0].min() >= level + 1


def tiny(**changes):
    made = tree_of("mae", **changes)
    with made.objective.unlocked():
        made.objective.masking = config.choose(Masking, "subtrees")
    with made.data.unlocked():
        made.data.source = config.choose(Source, "hierarchy")
    made.data.source.update(dict(levels=2, token=2, images=64, held_out_images=32))
    made.data.update(dict(image_size=(8, 8), flip=False))
    made.objective.color_jitter = "none"
    made.objective.mean, made.objective.std = (0.5,) * 3, (0.125,) * 3
    return made


def test_a_run_reads_the_tree_of_its_images():
    plan = Plan.of(tiny(), jax.devices()[:1])
    assert plan.reads == ("image", "tree")
    assert plan.abstract_batch()["tree"].shape[1:] == (2, 4, 4)


def test_what_does_not_fit_is_refused_before_anything_compiles():
    made = tiny()
    made.objective.masking.level = 3
    with pytest.raises(config.ConfigError, match="level=3 of a tree of 2 levels"):
        Plan.of(made, jax.devices()[:1])
    made = tiny()
    made.objective.encoder.patch = 4
    with pytest.raises(config.ConfigError, match="tree is over 4x4 patches, and the"):
        Plan.of(made, jax.devices()[:1])
    made = tree_of("mae")
    with made.objective.unlocked():
        made.objective.masking = config.choose(Masking, "subtrees")
    with pytest.raises(config.ConfigError, match="no 'tree', which masking Subtrees"):
        Plan.of(made, jax.devices()[:1])
    with pytest.raises(ValueError, match="ratio=0.99 leaves 0 of 64 patches visible"):
        Subtrees(ratio=0.99).visible_count(GRID)
