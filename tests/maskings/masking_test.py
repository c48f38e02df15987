# SPDX-License-Identifier: Apache-2.0
"""What every masking of the table promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mim_jax.maskings import MASKINGS
from mim_jax.maskings.block import Block
from mim_jax.maskings.grid import GridMasking
from mim_jax.maskings.none import Nothing
from mim_jax.maskings.random import Random
from mim_jax.ops.patches import Grid

GRID = Grid(6, 8, 4)
_ROWS, _COLS = np.divmod(np.arange(GRID.size), GRID.cols)
# Fields of an example: a hierarchy of 2 x 2 squares below pairs of rows.
FIELDS = {
    "tree": np.stack([_ROWS // 2 * 4 + _COLS // 2, _ROWS // 2]).reshape(2, 6, 8),
}
# What to test a masking with, if not its defaults on GRID.
MEMBERS = {
    "random": (Random(), Random(ratio=0.6, unit=12, partial_units="allow")),
    "block": (Block(least=4),),
}


def members_of(name: str) -> tuple:
    return MEMBERS[name] if name in MEMBERS else (MASKINGS[name](),)


every_member = pytest.mark.parametrize(
    "masking", [one for name in MASKINGS for one in members_of(name)], ids=str
)


def fields_of(masking, rows: int) -> dict:
    """The fields that it reads, the same for all images of a batch."""
    found = {name: jnp.asarray(FIELDS[name], jnp.int32) for name in masking.reads}
    return {name: jnp.stack([one] * rows) for name, one in found.items()}


def draw(masking, keys):
    given = fields_of(masking, len(keys))
    if masking.refresh_every:
        given["memory"] = masking.first_memory(GRID)
    return masking(keys, GRID, **given)


def keys_of(count: int, seed: int = 0):
    return jax.random.split(jax.random.key(seed), count)


@functools.cache
def drawer(masking):
    """The masking under jit, compiled once for all tests of a batch of eight."""
    return jax.jit(functools.partial(draw, masking))


def same(one, other) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", MASKINGS)
def test_every_masking_is_tested_on_a_grid_that_it_fits(name):
    for masking in members_of(name):
        assert set(masking.reads) <= FIELDS.keys(), f"give {name!r} fields in FIELDS"
        try:
            masking.visible_count(GRID)
        except ValueError as error:
            pytest.fail(f"give {name!r} a row in MEMBERS of {__file__}: {error}")


def test_nothing_is_hidden_by_nothing():
    mask = Nothing()(keys_of(3), GRID)
    assert Nothing().visible_count(GRID) == GRID.size
    assert mask.keep.tolist() == [list(range(GRID.size))] * 3
    assert mask.drop.shape == (3, 0) and not mask.hidden.any()


@every_member
def test_keep_and_drop_partition_the_grid(masking):
    mask = drawer(masking)(keys_of(8))
    assert mask.keep.shape == (8, masking.visible_count(GRID))
    assert mask.keep.dtype == mask.drop.dtype == jnp.int32
    both = np.sort(np.concatenate(mask, axis=1), axis=1)
    np.testing.assert_array_equal(both, [np.arange(GRID.size)] * 8)
    for hidden, drop in zip(mask.hidden, mask.drop, strict=True):
        assert np.flatnonzero(hidden).tolist() == sorted(drop.tolist())


@every_member
def test_images_and_keys_have_their_own_masks(masking):
    hidden = np.concatenate([drawer(masking)(keys_of(8, s)).hidden for s in (0, 1)])
    found, distinct = len(np.unique(hidden, axis=0)), masking.distinct
    # A masking with few different masks says so, and all of them are drawn.
    assert found > 12 if distinct is None or distinct > 12 else found == distinct


@every_member
def test_a_mask_depends_on_its_own_key_alone(masking):
    keys = keys_of(8)
    others = keys_of(8, seed=1).at[3].set(keys[3])
    together, swapped = drawer(masking)(keys), drawer(masking)(keys[::-1])
    assert same(together, [leaf[::-1] for leaf in swapped])
    assert same(*([leaf[3] for leaf in drawer(masking)(k)] for k in (keys, others)))


@every_member
def test_bits_are_those_of_any_number_of_devices_of_jit_and_of_vmap(masking):
    keys = keys_of(8)
    expected = draw(masking, keys)
    assert same(drawer(masking)(keys), expected)
    one_by_one = jax.vmap(lambda key: draw(masking, key[None]))(keys)
    assert same([leaf[:, 0] for leaf in one_by_one], expected)
    for count in (1, 2, 4, 8):
        mesh = jax.make_mesh(
            (count,), ("data",), (AxisType.Auto,), devices=jax.devices()[:count]
        )
        rows = NamedSharding(mesh, PartitionSpec("data"))
        spread = jax.device_put(keys, rows)
        mask = jax.jit(drawer(masking), out_shardings=rows)(spread)
        assert len(mask.keep.sharding.device_set) == count
        assert same(mask, expected)


@every_member
def test_bits_are_those_without_64_bit_types(masking):
    keys = keys_of(8)
    expected = drawer(masking)(keys)
    with jax.enable_x64(True):
        assert same(jax.jit(functools.partial(draw, masking))(keys), expected)


# The 99.99 % points of chi-square: one of 10,000 seeds would fail, this one does not.
CHI_SQUARE = {1: 15.14, 47: 92.9}


def test_random_hides_every_patch_equally_often():
    masking, images = Random(ratio=0.75), 4000
    counts = np.asarray(masking(keys_of(images), GRID).hidden).sum(axis=0)
    # Without replacement: the counts of patches are correlated by -1 / (n - 1).
    variance = images * 0.75 * 0.25 * GRID.size / (GRID.size - 1)
    assert ((counts - images * 0.75) ** 2 / variance).sum() < CHI_SQUARE[47]


def test_grid_keeps_every_place_of_a_cell_equally_often():
    images, cell = 4000, 2
    mask = GridMasking(cell=cell)(keys_of(images), GRID)
    visible = ~np.asarray(mask.hidden).reshape(images, 3, 2, 4, 2)
    assert (visible.sum(axis=(2, 4)) == 1).all()  # one in each cell
    counts = visible.sum(axis=0)
    assert ((counts - 1000) ** 2 / 1000).sum() < 78.0  # 12 cells, 3 free each: 36


@pytest.mark.parametrize("masking", [Random(ratio=0.5), GridMasking()], ids=str)
def test_neighbours_in_a_batch_are_independent(masking):
    hidden = np.asarray(masking(keys_of(8000), GRID).hidden)
    left, right = hidden[0::2].astype(float), hidden[1::2].astype(float)
    left, right = left - left.mean(axis=0), right - right.mean(axis=0)
    scale = left.std(axis=0)[:, None] * right.std(axis=0)[None]
    correlation = (left.T @ right) / len(left) / scale
    # Every pair of patches: 2,304 numbers of deviation 1 / sqrt(4000).
    assert np.abs(correlation).max() * np.sqrt(len(left)) < 5
    assert abs((correlation**2).mean() * len(left) - 1) < 0.15
