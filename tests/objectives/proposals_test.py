# SPDX-License-Identifier: Apache-2.0
"""How the objective `detection` gets from anchors to proposals and from these to
answers, against loops over single boxes in NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.models.detection import LEVELS, Pyramid
from mim_jax.objectives.detection import Answers, Detection, Proposals

SIZE = (12.0, 20.0)  # rows and columns of the picture


def boxes_of(rng, count, most=24.0):
    corner = rng.uniform(-4, most - 8, (count, 2))
    return np.concatenate([corner, corner + rng.uniform(2, 10, (count, 2))], axis=1)


def moved(box, code, weights=(1, 1, 1, 1)):
    """The box that a code makes of another one, cut to the picture."""
    across, down, wide, tall = np.divide(code, weights)
    x = (box[0] + box[2]) / 2 + across * (box[2] - box[0])
    y = (box[1] + box[3]) / 2 + down * (box[3] - box[1])
    width = (box[2] - box[0]) * math.exp(wide)
    height = (box[3] - box[1]) * math.exp(tall)
    rows, cols = SIZE
    left, right = (min(max(x + sign * width / 2, 0), cols) for sign in (-1, 1))
    top, bottom = (min(max(y + sign * height / 2, 0), rows) for sign in (-1, 1))
    return np.array([left, top, right, bottom])


def area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def overlap(a, b):
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    both = math.prod(np.maximum(high - low, 0))
    return both / (area(a) + area(b) - both)


def suppressed(found, most):
    """Of (score, class, box) in falling order, those that no kept one overlaps."""
    kept = []
    for one in found:
        rivals = [other for other in kept if other[1] == one[1]]
        if all(overlap(one[2], other[2]) <= most for other in rivals):
            kept.append(one)
    return kept


def best(found, count):
    return sorted(found, key=lambda one: -one[0])[:count]


@pytest.mark.parametrize("after", [10, 500])
def test_proposals_are_the_best_boxes_of_each_level_that_do_not_overlap(after):
    rng, limit = np.random.default_rng(0), 25
    one = Detection(proposals=Proposals(after=after, overlap=0.4))
    anchors = [boxes_of(rng, count).astype(np.float32) for count in (60, 18)]
    logits = [rng.normal(size=len(places)) for places in anchors]
    offsets = [0.4 * rng.normal(size=places.shape) for places in anchors]
    offsets[0][:6, 0] = 9.0  # they leave the picture
    logits[0][:6] += 4.0
    scored = [
        (jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
        for a, b in zip(logits, offsets, strict=True)
    ]
    boxes, real = jax.jit(lambda s: one._propose(limit, anchors, s, jnp.array(SIZE)))(
        scored
    )
    want, outside = [], 0
    for places, scores, codes in zip(anchors, logits, offsets, strict=True):
        order = best(zip(scores, range(len(places)), strict=True), limit)
        found = [(score, 0, moved(places[k], codes[k])) for score, k in order]
        solid = [one for one in found if area(one[2]) > 0]
        outside += len(found) - len(solid)
        want += suppressed(solid, 0.4)
    want = best(want, after)
    assert outside and 10 <= len(want) < 43
    assert int(real.sum()) == len(want) and np.asarray(real)[: len(want)].all()
    np.testing.assert_allclose(
        boxes[: len(want)], [one[2] for one in want], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("candidates, most", [(20, 90), (400, 15), (400, 90)])
def test_answers_are_the_best_boxes_of_each_class_that_do_not_overlap(candidates, most):
    rng, classes, count = np.random.default_rng(1), 3, 40
    given = Answers(least=0.1, candidates=candidates, overlap=0.3, most=most)
    one = Detection(classes=classes, answers=given)
    boxes = boxes_of(rng, count)
    real = rng.random(count) < 0.8
    logits = 2.0 * rng.normal(size=(count, classes + 1))
    moves = rng.normal(size=(count, classes, 4)) * (2.0, 2.0, 1.0, 1.0)
    moves[real.argmax(), :, 0] = 100.0  # it leaves the picture
    logits[real.argmax(), 1] = 9.0
    found = jax.jit(one._answers)(
        jnp.asarray(boxes, jnp.float32),
        jnp.asarray(real),
        jnp.asarray(logits, jnp.float32),
        jnp.asarray(moves, jnp.float32),
        jnp.array(SIZE),
    )
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    every = [
        (shares[k, label], label, moved(boxes[k], moves[k, label], (10, 10, 5, 5)))
        for k in np.flatnonzero(real)
        for label in range(classes)
    ]
    solid = [x for x in best(every, candidates) if x[0] > 0.1 and area(x[2]) > 0]
    want = suppressed(solid, 0.3)[:most]
    alone = suppressed([(score, 0, box) for score, _, box in solid], 0.3)
    assert 5 <= len(want) < len(solid) and len(want) != len(alone)
    got, scores, labels, valid = (np.asarray(x) for x in found)
    assert valid.sum() == len(want) and valid[: len(want)].all()
    np.testing.assert_array_equal(labels[valid], [x[1] for x in want])
    np.testing.assert_allclose(scores[valid], [x[0] for x in want], rtol=1e-4)
    np.testing.assert_allclose(got[valid], [x[2] for x in want], rtol=1e-4, atol=1e-4)


def test_larger_regions_are_read_from_coarser_maps():
    """A square as large as the image of pre-training, 14 patches, from the map of
    patches; one of half its side from the map with twice its resolution."""
    one = Detection()
    sides = one.encoder.patch * np.array([3.5, 7.0, 14.0, 28.0, 100.0, 1.0])
    boxes = np.stack([0 * sides, 0 * sides, sides, sides], axis=1)
    maps = [jnp.full((1, 64, 64, 1), float(level)) for level in range(LEVELS + 1)]
    found = one._regions(maps, jnp.asarray(boxes[None], jnp.float32), 1)
    np.testing.assert_array_equal(found.ravel(), [0, 1, 2, 3, 3, 0])


def test_a_feature_pyramid_adds_each_coarser_map_to_the_finer_one():
    """With one map let through, the finest shows its pixels enlarged."""
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 4, 6, 4)), jnp.float32)
    net = Pyramid(width=4)
    params = jax.jit(net.init)(jax.random.key(0), x)["params"]
    zero = jax.tree.map(jnp.zeros_like, params)
    same = jnp.eye(4)[None, None]
    zero["out0"]["kernel"] = zero["out0"]["kernel"].at[1, 1].set(same[0, 0])
    pooled = np.asarray(x).reshape(1, 2, 2, 3, 2, 4).max(axis=(2, 4))
    for level, want in ((2, np.asarray(x)), (3, pooled)):
        through = zero | {f"lateral{level}": zero[f"lateral{level}"] | {"kernel": same}}
        finest = net.apply({"params": through}, x)[0]
        want = want.repeat(2**level, axis=1).repeat(2**level, axis=2)
        np.testing.assert_allclose(finest, want, atol=1e-6)
