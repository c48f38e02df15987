# SPDX-License-Identifier: Apache-2.0
"""What the objective `detection` promises besides the contract of objectives."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import plan_of

from mim_jax import config
from mim_jax.aot.step import plan_on
from mim_jax.models.detection import Pyramid
from mim_jax.objectives.detection import Detection, Proposals, _mask_loss, _Taken

MOST = 4
ROOT = pathlib.Path(__file__).parents[2]


@functools.cache
def objective():
    found = plan_of("detection").settings.objective
    encoder = found.encoder.clone(drop_path=0.0)
    return dataclasses.replace(found, encoder=encoder)


def batch_of(rows=2, **changes):
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 5, (rows, MOST, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(3, 7, corner.shape)], axis=2)
    batch = {
        "image": rng.integers(0, 256, (rows, 12, 12, 1), np.uint8),
        "size": np.full((rows, 2), 12, np.int32),
        "boxes": boxes.astype(np.float32),
        "boxes_valid": np.ones((rows, MOST), bool),
        "categories": rng.integers(0, 14, (rows, MOST)).astype(np.int32),
        "masks": rng.random((rows, MOST, 14, 14)) > 0.5,
        "masks_valid": np.ones((rows, MOST), bool),
    }
    return {name: jnp.asarray(one) for name, one in (batch | changes).items()}


@functools.cache
def params():
    made, _ = jax.jit(objective().init)(jax.random.key(0), batch_of())
    # A score from which some boxes are answers.
    noise = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: x + jnp.asarray(0.05 * noise.standard_normal(x.shape), x.dtype), made
    )


@functools.cache
def compiled(rows):
    def both(params, batch, keys):
        loss = lambda params: objective().loss(params, None, batch, keys)  # noqa: E731
        return jax.value_and_grad(loss, has_aux=True)(params)

    return jax.jit(both)


def losses(batch, keys=None):
    rows = len(batch["image"])
    keys = jax.random.split(jax.random.key(3), rows) if keys is None else keys
    (loss, aux), grads = compiled(rows)(params(), batch, keys)
    assert np.isfinite(loss)
    assert all(np.isfinite(one).all() for one in jax.tree.leaves(grads))
    return {"loss": float(loss)} | {k: float(v) for k, v in aux.metrics.items()}


def test_the_loss_is_a_sum_and_a_mean_over_images():
    batch, keys = batch_of(), jax.random.split(jax.random.key(3), 2)
    both = losses(batch, keys)
    parts = [value for name, value in both.items() if name.startswith("loss_")]
    assert len(parts) == 5 and both["loss"] == pytest.approx(sum(parts), rel=1e-5)
    # Each image twice, so that one program serves.
    for name in both:
        alone = []
        for row in range(2):
            twice = jax.tree.map(lambda x, row=row: x[jnp.array([row, row])], batch)
            same = jnp.stack([keys[row], keys[row]])
            alone.append(losses(twice, same)[name])
        assert both[name] == pytest.approx(np.mean(alone), rel=1e-4), name


def test_without_objects_only_scores_are_learned():
    found = losses(batch_of(boxes_valid=np.zeros((2, MOST), bool)))
    for name in ("loss_box", "loss_mask", "loss_anchor_box", "positive_regions"):
        assert found[name] == 0, name
    assert found["loss_class"] > 0 and found["loss_anchor_score"] > 0


def test_objects_without_area_or_mask_do_no_harm():
    boxes = np.array(batch_of()["boxes"])
    boxes[:, 0, 2:] = boxes[:, 0, :2]
    boxes[:, 1] = -3, -3, 15, 15  # over the border
    losses(batch_of(boxes=boxes))
    found = losses(batch_of(masks_valid=np.zeros((2, MOST), bool)))
    assert found["loss_mask"] == 0 and found["loss_box"] > 0


def test_objects_that_are_padding_do_not_matter():
    valid = np.array([[True, True, False, False]] * 2)
    one = batch_of(boxes_valid=valid)
    boxes, labels = np.array(one["boxes"]), np.array(one["categories"])
    boxes[:, 2:], labels[:, 2:] = 0, -1
    other = batch_of(boxes_valid=valid, boxes=boxes, categories=labels)
    assert losses(one) == losses(other)


def test_the_objects_themselves_are_regions_of_their_class():
    batch, size = batch_of(), objective().regions.samples
    taken = jax.jit(objective()._sample)(
        jax.random.key(0),
        batch["boxes"][0],
        batch["boxes_valid"][0],
        batch["boxes"][0],
        batch["boxes_valid"][0],
        batch["categories"][0],
    )
    assert len(taken.boxes) == min(MOST, size) and taken.valid.all()
    positive = np.asarray(taken.positive)
    assert positive.sum() == min(MOST, int(size * 0.25))
    for place in np.flatnonzero(positive):
        best = int(taken.best[place])
        np.testing.assert_array_equal(taken.boxes[place], batch["boxes"][0, best])
        assert taken.label[place] == batch["categories"][0, best]


def test_the_mask_loss_is_the_cross_entropy_of_the_right_class():
    masks = np.random.default_rng(0).random((2, 14, 14)) > 0.5
    objects = jnp.array([[0.0, 0.0, 6.0, 6.0], [2.0, 2.0, 10.0, 9.0]])
    taken = _Taken(
        # The second region is the left half of its object.
        boxes=jnp.array([[0.0, 0, 6, 6], [2, 2, 6, 9], [0, 0, 1, 1]]),
        best=jnp.array([0, 1, 0], jnp.int32),
        label=jnp.array([1, 0, 2], jnp.int32),
        positive=jnp.array([True, True, False]),
        valid=jnp.array([True, True, True]),
    )
    logits = np.full((3, 14, 14, 3), 5.0, np.float32)
    logits[0, ..., 1] = np.where(masks[0], 2.0, -2.0)
    half = masks[1, :, :7].repeat(2, axis=1)
    logits[1, ..., 0] = np.where(half, 1.0, -1.0)
    logits[2] = 7.0

    def loss(*have_masks):
        given = jnp.asarray(masks), jnp.array(have_masks)
        return float(_mask_loss(taken, jnp.asarray(logits), objects, *given))

    first, second = np.log1p(np.exp([-2.0, -1.0]))
    assert loss(True, True) == pytest.approx((first + second) / 2, rel=1e-5)
    assert loss(False, True) == pytest.approx(second, rel=1e-5)


def test_the_heads_losses_do_not_teach_the_proposals():
    def heads(network, batch):
        made = params() | {"proposer": network}
        keys = jax.random.split(jax.random.key(3), 2)
        found = objective().loss(made, None, batch, keys)[1].metrics
        return found["loss_class"] + found["loss_box"] + found["loss_mask"]

    slopes = jax.jit(jax.grad(heads))(params()["proposer"], batch_of())
    assert not any(one.any() for one in jax.tree.leaves(slopes))


def test_every_object_is_a_region_that_the_heads_learn():
    """Even if no proposal overlaps it: each joins the proposals."""
    samples = objective().regions.samples
    assert losses(batch_of())["positive_regions"] >= min(MOST, int(samples * 0.25))


def _log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_the_box_of_a_region_is_learned_for_its_own_class_alone():
    one = dataclasses.replace(objective(), classes=3)
    # The first object is as large as its region, two pixels further right; the second
    # is twice as wide and begins at the same corner.
    objects = np.array([[2, 0, 6, 4], [0, 0, 8, 4]], np.float32)
    taken = _Taken(
        boxes=jnp.array([[0.0, 0.0, 4.0, 4.0]] * 4),
        best=jnp.array([0, 1, 1, 0], jnp.int32),
        label=jnp.array([2, 0, 3, 1], jnp.int32),
        positive=jnp.array([True, True, False, False]),
        valid=jnp.array([True, True, True, False]),
    )
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 4)).astype(np.float32)
    moves = rng.normal(size=(4, 3, 4)).astype(np.float32)
    found = one._region_losses(
        taken, jnp.asarray(logits), jnp.asarray(moves), jnp.asarray(objects)
    )
    # Shifts of the centre in sides, times 10; logarithms of the sides, times 5.
    first = np.array([10 * 2 / 4, 0, 0, 0])
    second = np.array([10 * 2 / 4, 0, 5 * np.log(2), 0])
    error = np.abs(moves[0, 2] - first).sum() + np.abs(moves[1, 0] - second).sum()
    samples = one.regions.samples
    assert float(found["box"]) == pytest.approx(error / samples, rel=1e-5)
    wrong = -_log_softmax(logits)[[0, 1, 2], [2, 0, 3]].sum()
    assert float(found["class"]) == pytest.approx(wrong / samples, rel=1e-5)


def test_anchors_learn_scores_and_the_boxes_of_their_objects():
    # Two anchors are their objects but for a shift by one pixel, one overlaps the first
    # object by a half and is ignored, and one lies elsewhere.
    anchors = np.array([[0, 0, 8, 8], [0, 0, 8, 16], [20, 20, 28, 28], [40, 0, 48, 8]])
    objects = [[1, 0, 9, 8], [20, 21, 28, 29], [0, 0, 0, 0]]
    given = dataclasses.replace(objective().proposals, samples=16)
    one = dataclasses.replace(objective(), proposals=given)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=4).astype(np.float32)
    offsets = rng.normal(size=(4, 4)).astype(np.float32)
    found = one._anchor_losses(
        anchors.astype(np.float32),
        jax.random.key(0),
        jnp.asarray(logits),
        jnp.asarray(offsets),
        jnp.array(objects, jnp.float32),
        jnp.array([True, True, False]),
    )
    score = np.log1p(np.exp(-logits[[0, 2]])).sum() + np.log1p(np.exp(logits[3]))
    assert float(found["anchor_score"]) == pytest.approx(score / 16, rel=1e-5)
    want = np.array([[1 / 8, 0, 0, 0], [0, 1 / 8, 0, 0]])
    error = np.abs(offsets[[0, 2]] - want).sum()
    assert float(found["anchor_box"]) == pytest.approx(error / 16, rel=1e-5)


@functools.cache
def detected():
    batch = batch_of(size=np.array([[12, 12], [6, 9]], np.int32))
    wide = dataclasses.replace(objective().answers, least=0.0)
    one = dataclasses.replace(objective(), answers=wide)
    return jax.jit(one.detect)(params(), batch["image"], batch["size"])


def test_answers_lie_in_the_picture_in_order_and_do_not_overlap():
    found = detected()
    assert found.valid.any(axis=1).all()
    for row, (rows, cols) in enumerate(((12, 12), (6, 9))):
        valid = np.asarray(found.valid[row])
        assert (valid[:-1] >= valid[1:]).all()
        boxes, scores = found.boxes[row][valid], found.scores[row][valid]
        assert (boxes >= 0).all()
        assert (boxes[:, 2] <= cols).all() and (boxes[:, 3] <= rows).all()
        assert (np.diff(scores) <= 0).all() and (scores > 0).all()
        assert ((0 <= found.classes[row]) & (found.classes[row] < 14)).all()
    assert found.masks.shape == (2, 5, 28, 28)
    assert ((found.masks >= 0) & (found.masks <= 1)).all()


def test_a_mask_is_that_of_its_own_box_however_many_answers_there_are():
    batch = batch_of(size=np.array([[12, 12], [6, 9]], np.int32))
    answers = dataclasses.replace(objective().answers, least=0.0, most=1)
    one = dataclasses.replace(objective(), answers=answers)
    alone = jax.jit(one.detect)(params(), batch["image"], batch["size"]).masks
    found = detected().masks
    assert np.abs(found[:, 1:] - found[:, :1]).max() > 1e-3
    np.testing.assert_allclose(alone, found[:, :1], atol=1e-6)


def test_training_and_evaluation_propose_from_their_own_numbers_of_anchors():
    batch = batch_of(size=np.array([[12, 12], [6, 9]], np.int32))
    changed = {}
    for name in ("before", "before_eval"):
        given = dataclasses.replace(objective().proposals, **{name: 1})
        answers = dataclasses.replace(objective().answers, least=0.0)
        one = dataclasses.replace(objective(), proposals=given, answers=answers)
        found = jax.jit(one.detect)(params(), batch["image"], batch["size"])
        changed[name] = bool((found.scores != detected().scores).any())
    assert changed == {"before": False, "before_eval": True}


def test_a_logit_that_is_not_finite_is_no_image_without_objects():
    batch, broken = batch_of(), jax.tree.map(lambda x: x, params())
    kernel = broken["box_head"]["score"]["kernel"]
    broken["box_head"]["score"]["kernel"] = kernel.at[0, 0].set(jnp.inf)
    found = jax.jit(objective().detect)(broken, batch["image"], batch["size"])
    assert np.isnan(found.scores).all()
    assert np.isfinite(detected().scores).all()


def test_the_parts_of_the_work_are_those_that_the_compiler_counts():
    one = objective()
    images = jax.ShapeDtypeStruct((1, 12, 12, 1), jnp.float32)
    cost = jax.jit(one.maps).lower(params(), images).compile().cost_analysis()
    parts = one.parts((12, 12, 1))
    counted = parts["encoder"] + parts["pyramid"]
    assert counted == pytest.approx(cost["flops"], rel=0.25)


def test_windows_save_pairs_of_patches():
    small = Detection(window=8)
    whole, few = (one.parts((1024, 1024, 3))["encoder"] for one in (Detection(), small))
    pairs = 4 * 768 * 4096 * (4096 - 64)
    assert whole - few == pytest.approx(8 * pairs)  # four of twelve blocks are whole


@pytest.mark.parametrize(
    "shape, changes, message",
    [
        ((48, 64, 3), {}, "3 x 4 patches: want multiples of 2, by"),
        ((64, 96, 3), dict(window=4), r"4 x 6 patches: want .* and of window=4"),
        ((64, 60, 3), {}, "multiples of the patch"),
        ((64, 64, 1), {}, "one number per channel"),
        ((64, 64, 3), dict(pyramid=Pyramid(width=0)), "pyramid.width=0"),
    ],
)
def test_images_that_do_not_fit_are_refused(shape, changes, message):
    with pytest.raises(ValueError, match=message):
        Detection(**changes).check_shape(shape)


def test_overlaps_are_in_order():
    with pytest.raises(ValueError, match="low=0.8, high=0.7: want low <= high"):
        Proposals(low=0.8)


def test_the_recipe_is_vitdets_for_45_epochs(monkeypatch):
    """arXiv:2203.16527, appendix, for the epochs of arXiv:2306.04898. The data need not
    be there to plan it."""
    monkeypatch.delenv("COCO_DIR", raising=False)
    tree = config.read(str(ROOT / "configs" / "detect.py"))
    plan, source = plan_on(tree, jax.devices()[:1])
    assert source == "photos: the data of coco are not here"
    assert plan.total == 82969 and plan.settings.batch_size == 64
    rates = [float(plan.schedule(step)) for step in (0, 125, 250, 73749, 73751, 79897)]
    np.testing.assert_allclose(rates, [0, 5e-5, 1e-4, 1e-4, 1e-5, 1e-6], rtol=5e-3)
    optim = plan.settings.optim
    assert (optim.b1, optim.b2, optim.weight_decay) == (0.9, 0.999, 0.1)
    assert optim.layer_decay == 0.7
    one = plan.settings.objective
    assert one.encoder.drop_path == 0.1 and one.encoder.positions == "learned"
    assert one.grid((1024, 1024)) == (64, 64, 16)
    assert one.global_blocks == (2, 5, 8, 11) and one.classes == 80
