# SPDX-License-Identifier: Apache-2.0
"""The one step on any mesh: the numbers of one device, each state in its place."""

import re

import jax
import numpy as np
import pytest
from steps import (
    MESHES,
    ROWS,
    batch_for,
    bits,
    close,
    first_state,
    gradients,
    on_mesh,
    one_step,
    place,
    plan_of,
    step_of,
)

from mim_jax import sharding, train
from mim_jax.aot import hlo
from mim_jax.sharding import path_name


@pytest.mark.parametrize(
    "mesh",
    [
        # Two axes at a time are slow: the last one has all three.
        pytest.param(mesh, marks=pytest.mark.slow if mesh in MESHES[2:4] else ())
        for mesh in MESHES[1:]
    ],
    ids=str,
)
def test_loss_and_gradients_are_those_of_one_device(mesh):
    alone, alone_metrics = one_step(on_mesh(*MESHES[0]))
    spread, metrics = one_step(on_mesh(*mesh))
    np.testing.assert_allclose(metrics["loss"], alone_metrics["loss"], rtol=1e-5)
    close(gradients(spread), gradients(alone), 1e-5)
    assert np.abs(gradients(alone)["encoder"]["embed"]["kernel"]).max() > 0
    assert metrics["ok"] and int(spread.step) == 1


@pytest.mark.parametrize("mesh", MESHES[1:], ids=str)
def test_masks_have_the_bits_of_one_device(mesh):
    def keep(plan):
        def draw(state, batch):
            keys = train.example_keys(state, ROWS)
            return plan.settings.objective.mask(batch, keys).keep

        return np.asarray(jax.jit(draw)(place(plan), batch_for(plan)))

    np.testing.assert_array_equal(keep(on_mesh(*mesh)), keep(on_mesh(*MESHES[0])))


def test_a_state_is_born_sharded_and_with_the_same_bits():
    plan = on_mesh(8, 2, 4)
    placed = jax.tree.map(lambda leaf: leaf.sharding, plan.abstract_state())
    state = plan.first_state()
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == placed
    # The xavier bound may be rounded otherwise on another mesh; draws may not.
    close(jax.device_get(state.params), first_state().params, 1e-6)


def test_the_first_state_is_what_create_makes():
    plan = on_mesh(8, 2, 4)
    placed = jax.tree.map(lambda leaf: leaf.sharding, plan.abstract_state())
    made = jax.jit(plan.create, out_shardings=placed)()
    state, (params, stats) = plan.first_state(), plan.initial()
    assert jax.tree.structure(state) == jax.tree.structure(made)
    assert bits(state) == bits(made)
    # The programs run again: what was given away is made anew.
    assert bits(params) == bits(made.params) and bits(stats) == bits(made.stats)


def test_every_device_holds_its_share_of_the_state():
    def held(plan) -> int:
        numbers = [
            leaf.addressable_shards[0].data.nbytes
            for leaf in jax.tree.leaves(place(plan))
            if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        ]
        return sum(numbers)

    whole, shared = held(on_mesh(8, 8, 1)), held(on_mesh(8, 2, 4))
    assert shared < 0.35 * whole
    state = place(on_mesh(8, 2, 4))
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    assert abs(sharding.bytes_per_device(state, placed) - shared) < 100  # the key
    # Parameters, and both moments of Adam, all the large ones.
    cut = {
        path_name(path)
        for path, leaf in jax.tree.leaves_with_path(state)
        if not leaf.sharding.is_fully_replicated
    }
    for tree in ("params", "opt_state/0/mu", "opt_state/0/nu"):
        for part in ("encoder/block00", "encoder/block01", "decoder/block00"):
            for leaf in ("attn/qkv", "attn/out", "fc1", "fc2"):
                assert f"{tree}/{part}/{leaf}/kernel" in cut


def test_tensor_devices_share_the_work_on_an_image():
    """Each of two makes about half of what the matrices of blocks make."""

    def made(*mesh):
        dots = [
            one
            for one in hlo.executed(train.lowered(on_mesh(*mesh)).compile().as_text())
            if one.instruction.opcode in ("dot", "fusion", "custom-call")
            and re.search(r"/(qkv|fc1|fc2|out)/", one.instruction.scope)
        ]
        return sum(one.times * hlo.size_of(one.instruction.shape) for one in dots)

    whole = made(1, 1, 1, 1)
    assert whole > 0
    assert made(2, 1, 1, 2) < 0.75 * whole
    assert made(2, 2, 1, 1) < 0.75 * whole  # as rows do


def test_fsdp_sends_weights_and_not_activations():
    plan = plan_of(8, scan=True, mesh__data=1, mesh__fsdp=8)
    sent = hlo.collectives(train.lowered(plan).compile().as_text() or "")
    params = jax.tree.leaves(plan.abstract_state().params)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in params)
    assert 0 < sent["all-gather"]["bytes"] < 1.05 * held
    assert "all-to-all" not in sent


def test_the_step_keeps_the_shardings():
    plan = on_mesh(8, 2, 4)
    before = jax.tree.map(lambda leaf: leaf.sharding, place(plan))
    after, _ = step_of(plan)(place(plan), batch_for(plan))
    assert jax.tree.map(lambda leaf: leaf.sharding, after) == before


def test_stacked_rules_are_the_rules_of_single_blocks():
    plain = plan_of(8, scan=False, mesh__data=2, mesh__fsdp=4).abstract_state()
    stacked = plan_of(8, scan=True, mesh__data=2, mesh__fsdp=4).abstract_state()
    kernel = plain.params["encoder"]["block00"]["fc1"]["kernel"].sharding.spec
    assert tuple(kernel) == (None, ("tensor", "fsdp"))
    for name, leaf in (("fc1", "kernel"), ("fc1", "bias"), ("fc2", "kernel")):
        one = plain.params["encoder"]["block00"][name][leaf].sharding.spec
        many = stacked.params["encoder"]["blocks"][name][leaf].sharding.spec
        assert tuple(many) == (None, *one)


@pytest.mark.parametrize("mesh", [MESHES[0], MESHES[3]], ids=str)
def test_the_old_state_is_given_up(mesh):
    plan = on_mesh(*mesh)
    state = place(plan)
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    size = sharding.bytes_per_device(state, placed)
    aliased = step_of(plan).memory_analysis().alias_size_in_bytes
    assert size - 200 <= aliased <= size + 200  # the key and the counters are small
    step_of(plan)(state, batch_for(plan))
    left = [
        path_name(path)
        for path, leaf in jax.tree.leaves_with_path(state)
        if not leaf.is_deleted()
    ]
    assert left == []
