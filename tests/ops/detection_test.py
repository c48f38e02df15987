# SPDX-License-Identifier: Apache-2.0
"""Boxes, matching, suppression, regions and masks against torchvision: stored values of
tests/golden/make_detection.py, and live ones where it is installed."""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import make_detection as golden

from mim_jax.ops import boxes as ops
from mim_jax.ops.losses import sigmoid_cross_entropy, smooth_l1
from mim_jax.ops.matching import match, nms, sample
from mim_jax.ops.roi import crop_masks, levels, paste_masks, paste_weights, roi_align

FILE = pathlib.Path(golden.__file__).with_name("detection.npz")
GIVEN = golden.inputs()
IN = {name: jnp.asarray(array) for name, array in GIVEN.items()}
SOLID = GIVEN["boxes"].copy()
SOLID[:, 2:] = np.maximum(SOLID[:, 2:], SOLID[:, :2] + 1)
SOLID = jnp.asarray(SOLID)
MAPS = [IN[f"map{number}"] for number in range(4)]
LIVE = pytest.param(
    "live",
    marks=[
        pytest.mark.oracle,
        pytest.mark.skipif(
            importlib.util.find_spec("torchvision") is None, reason="no torchvision"
        ),
    ],
)
references = pytest.mark.parametrize("reference", ["stored", LIVE])


@functools.cache
def wanted(reference):
    return golden.answers(GIVEN) if reference == "live" else dict(np.load(FILE))


def close(found, want, tolerance=1e-5):
    assert found.shape == want.shape
    error = np.abs(np.asarray(found, np.float64) - want) / np.maximum(np.abs(want), 1)
    assert error.max() <= tolerance, error.max()


@references
def test_areas_overlaps_and_clipping_are_torchvisions(reference):
    want = wanted(reference)
    # torchvision's area of a box without width is 0 as well.
    close(jax.jit(ops.area)(IN["boxes"]), want["area"], 1e-6)
    found = jax.jit(ops.iou)(SOLID, IN["objects"])
    columns = want["iou"].shape[1]
    # torchvision has NaN for two boxes without area, and no other NaN.
    close(found[:, :columns], np.nan_to_num(want["iou"]))
    size = jnp.asarray(golden.IMAGE, jnp.float32)
    close(jax.jit(ops.clip)(IN["boxes"], size), want["clipped"])


@references
def test_box_coding_is_torchvisions_and_its_own_inverse(reference):
    want = wanted(reference)
    code = jax.jit(functools.partial(ops.encode, weights=golden.WEIGHTS))
    decode = jax.jit(functools.partial(ops.decode, weights=golden.WEIGHTS))
    found = code(SOLID, IN["anchors"])
    close(found, want["encoded"])
    close(decode(IN["codes"], IN["anchors"]), want["decoded"])
    close(decode(found, IN["anchors"]), np.asarray(SOLID), 1e-4)


def test_coding_of_boxes_without_area_is_finite_and_large_codes_are_cut():
    flat = jnp.zeros((1, 4))
    assert np.isfinite(ops.encode(flat, flat)).all()
    assert np.isfinite(ops.encode(flat + 3, IN["anchors"][:1])).all()
    huge = ops.decode(jnp.full((1, 4), 1e4), jnp.array([[0.0, 0.0, 16.0, 16.0]]))
    assert float(huge[0, 2] - huge[0, 0]) == pytest.approx(1000, rel=1e-3)


@references
@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize("count, name", [(200, ""), (1, "_one")])
def test_matching_is_torchvisions(reference, best, count, name):
    want = wanted(reference)[f"matched{name}_{best}"]
    valid = jnp.arange(200) < count
    found = jax.jit(functools.partial(match, low=0.3, high=0.7, best=best))(
        SOLID, IN["objects"], valid
    )
    # torchvision: -1 is background, -2 is ignored.
    got = np.where(found.positive, found.best, np.where(found.negative, -1, -2))
    np.testing.assert_array_equal(got, want)
    assert (want >= 0).any() == (count > 1 or best) and (want == -2).any()


def test_without_objects_every_box_is_background():
    valid = jnp.zeros(200, bool)
    found = match(SOLID, IN["objects"], valid, low=0.3, high=0.7, best=True)
    assert not found.positive.any() and found.negative.all()
    assert (found.best == 0).all()


def test_an_object_without_area_matches_nothing():
    objects = jnp.array([[5.0, 5.0, 5.0, 9.0]])
    found = match(SOLID, objects, jnp.ones(1, bool), low=0.3, high=0.7, best=True)
    assert not found.positive.any()


@references
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_suppression_is_torchvisions(reference, threshold, grouped):
    order = np.argsort(-GIVEN["scores"])
    groups = jnp.asarray(GIVEN["groups"][order]) if grouped else None
    kept = jax.jit(functools.partial(nms, threshold=threshold))(
        jnp.asarray(GIVEN["boxes"][order]), jnp.ones(300, bool), groups=groups
    )
    name = "nms_groups" if grouped else "nms"
    want = wanted(reference)[f"{name}_{threshold}"]
    np.testing.assert_array_equal(order[np.asarray(kept)], want)
    assert len(want) < 300


def test_a_long_chain_of_rivals_is_resolved_in_order():
    """Each box overlaps its neighbours alone, so every second one is kept."""
    left = jnp.arange(50, dtype=jnp.float32) * 4
    chain = jnp.stack([left, left * 0, left + 10, left * 0 + 10], axis=1)
    kept = nms(chain, jnp.ones(50, bool), 0.3)
    np.testing.assert_array_equal(kept, np.arange(50) % 2 == 0)
    # What is not valid suppresses nothing.
    kept = nms(chain, jnp.arange(50) > 0, 0.3)
    np.testing.assert_array_equal(kept, np.arange(50) % 2 == 1)
    assert not nms(chain, jnp.zeros(50, bool), 0.3).any()


@references
@pytest.mark.parametrize("side", [2, 7])
@pytest.mark.parametrize("number", range(4))
def test_roi_align_is_torchvisions_on_every_level(reference, number, side):
    read = functools.partial(roi_align, strides=golden.STRIDES, side=side)
    level = jnp.full(40, number, jnp.int32)
    found = jax.jit(read)(MAPS, IN["boxes"][:40], level)
    close(found, wanted(reference)[f"roi{side}_{number}"])


def test_gradients_of_roi_align_reach_the_map_alone_where_boxes_are():
    def total(one):
        box = jnp.array([[8.0, 8.0, 24.0, 24.0]])
        level = jnp.zeros(1, jnp.int32)
        return roi_align([one], box, level, (4.0,), side=2).sum()

    slope = np.asarray(jax.grad(total)(MAPS[0]))
    assert slope.sum() == pytest.approx(4 * 3, rel=1e-5)  # bins, channels
    assert not slope[8:].any() and not slope[:, 8:].any() and slope[3, 3].all()


def test_levels_are_those_of_the_formula():
    sides = jnp.array([0.0, 10, 111, 112.5, 223, 224, 447, 448, 5000])
    square = jnp.stack([sides * 0, sides * 0, sides, sides], axis=1)
    found = levels(square, stride=4, count=4, first=16, side=224)
    # 224 pixels are read from stride 16, level 2; twice as many from level 3.
    assert found.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]


@references
def test_masks_are_pasted_as_by_grid_sample(reference):
    where = jnp.asarray(golden.paste_boxes())
    found = jax.jit(paste_masks, static_argnums=(2, 3))(IN["masks"], where, 64, 96)
    want = wanted(reference)["pasted"]
    close(found, want)
    assert not np.asarray(found)[3].any() and want.any(axis=(1, 2)).sum() > 6
    box = golden.paste_boxes()[0]
    y, x = (
        paste_weights(box[at], box[at + 2], count, 28, np)
        for at, count in ((1, 64), (0, 96))
    )
    close(y @ GIVEN["masks"][0] @ x.T, want[0])


def test_a_box_without_area_pastes_nothing():
    where = jnp.array([[5.0, 5.0, 5.0, 20.0]])
    assert not paste_masks(jnp.ones((1, 4, 4)), where, 32, 32).any()


@references
def test_mask_targets_are_those_of_roi_align(reference):
    masks, where = IN["masks"] > 0.5, jnp.asarray(golden.crops()[:, 1:])
    frames = jnp.tile(jnp.array([[0.0, 0.0, 28.0, 28.0]]), (12, 1))
    found = jax.jit(crop_masks, static_argnums=3)(masks, frames, where, 14)
    want = wanted(reference)["cut"]
    assert (np.abs(want - 0.5) > 1e-4).all()
    np.testing.assert_array_equal(found, want >= 0.5)
    # The frame's place and size do not matter, only where the box lies in it.
    moved = crop_masks(masks, 2 * frames + 7, 2 * where + 7, 14)
    np.testing.assert_array_equal(found, moved)


@references
def test_losses_are_pytorchs(reference):
    want = wanted(reference)
    logits, targets = IN["logits"], IN["targets"]
    close(sigmoid_cross_entropy(logits, targets), want["sigmoid_cross_entropy"])
    for beta in (0.0, 1 / 9, 1.0):
        close(smooth_l1(logits - targets, beta), want[f"smooth_l1_{beta:.2f}"])


def test_samples_have_the_counts_that_they_promise():
    positive, negative = jnp.arange(300) < 40, jnp.arange(300) >= 100
    seen = []
    for seed in range(3):
        found = sample(jax.random.key(seed), positive, negative, count=64, most=16)
        assert found.positive.sum() == 16 and found.positive[:16].all()
        assert found.valid.all() and len(set(found.place.tolist())) == 64
        chosen = np.asarray(found.place)
        assert (chosen[:16] < 40).all() and (chosen[16:] >= 100).all()
        seen.append(tuple(sorted(chosen[:16].tolist())))
    assert len(set(seen)) == 3
    few = sample(jax.random.key(0), positive & (jnp.arange(300) < 3), negative, 64, 16)
    assert few.positive.sum() == 3 and few.valid.sum() == 64
    none = sample(jax.random.key(0), positive & False, negative & False, 64, 16)
    assert not none.valid.any() and not none.positive.any()


def test_anchors_are_centred_and_have_their_area_and_ratio():
    found = ops.anchors((2, 3), stride=16, side=32, ratios=(0.5, 1.0, 2.0))
    assert found.shape == (18, 4) and found.dtype == np.float32
    sides = found[:, 2:] - found[:, :2]
    np.testing.assert_allclose(sides.prod(axis=1), 1024, rtol=1e-5)
    np.testing.assert_allclose(sides[:, 1] / sides[:, 0], [0.5, 1, 2] * 6, rtol=1e-5)
    centres = (found[:, 2:] + found[:, :2]) / 2
    np.testing.assert_allclose(centres[3], [24, 8], rtol=1e-6)  # second column
    np.testing.assert_allclose(centres[9], [8, 24], rtol=1e-6)  # second row
