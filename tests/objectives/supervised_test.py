# SPDX-License-Identifier: Apache-2.0
"""Supervised training: cross-entropy by hand, and labels that are not known."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import log_loss
from tiny import first_state, images_of, plan_of, tree_of

from mim_jax import config, optim
from mim_jax.data.sources.base import Source
from mim_jax.objectives.supervised import Supervised
from mim_jax.ops.mix import Erasing, Mix
from mim_jax.plan import Plan

CLASSES = 5


class Linear(Supervised):
    """The pixels of an image, with one weight for each pixel and class."""

    def scores(self, params, images, keys=None):
        return images.reshape(len(images), -1) @ params


def linear(**fields) -> Supervised:
    return Linear(**(dict(classes=CLASSES, mean=(0.5,), std=(0.25,)) | fields))


def data(rows: int = 12):
    """(weights, uint8 images, labels, float64 probabilities)."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(4, CLASSES)).astype(np.float32) * 3
    images = rng.integers(0, 256, (rows, 2, 2, 1), dtype=np.uint8)
    logits = images.reshape(rows, -1) / 255.0 @ weights.astype(np.float64)
    # Two of three are right.
    wrong = np.arange(rows) % 3 == 0
    labels = ((logits.argmax(axis=1) + wrong) % CLASSES).astype(np.int32)
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return weights, images, labels, chances


def loss_of(objective, weights, images, labels):
    batch = {"image": jnp.asarray(images), "label": jnp.asarray(labels)}
    keys = jax.random.split(jax.random.key(0), len(images))
    return objective.loss(jnp.asarray(weights), None, batch, keys)


def test_without_smoothing_it_is_the_log_loss():
    weights, images, labels, chances = data()
    loss, aux = loss_of(linear(smoothing=0.0), weights, images, labels)
    want = log_loss(labels, chances, labels=range(CLASSES))
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    assert float(aux.weight) == 12 and aux.stats == {}
    np.testing.assert_allclose(aux.metrics["accuracy"], 2 / 3, rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_smoothing_gives_every_class_its_share(smoothing):
    weights, images, labels, chances = data()
    loss, _ = loss_of(linear(smoothing=smoothing), weights, images, labels)
    wanted = np.full((12, CLASSES), smoothing / CLASSES)
    wanted[np.arange(12), labels] += 1 - smoothing
    want = -(wanted * np.log(chances)).sum(axis=1).mean()
    np.testing.assert_allclose(loss, want, rtol=1e-5)


def test_unknown_labels_have_no_weight():
    weights, images, labels, _ = data()
    unknown = np.array(labels)
    unknown[[1, 4, 5, 9]] = -1
    known = unknown >= 0
    got, aux = loss_of(linear(), weights, images, unknown)
    want, same = loss_of(linear(), weights, images[known], labels[known])
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for value, other in ((aux, same), (aux.metrics, same.metrics)):
        name = "accuracy" if isinstance(value, dict) else 0
        np.testing.assert_allclose(value[name], other[name], rtol=1e-6)
    assert float(aux.weight) == pytest.approx(8)
    # Whatever those images show.
    other = np.array(images)
    other[~known] = 255 - other[~known]
    assert loss_of(linear(), weights, other, unknown)[0] == got


def graded(micro_batches: int, images, labels, weights):
    objective = linear()
    grad_fn = jax.value_and_grad(objective.loss, has_aux=True)
    grad_fn = optim.accumulated(grad_fn, micro_batches)
    batch = {"image": jnp.asarray(images), "label": jnp.asarray(labels)}
    keys = jax.random.split(jax.random.key(0), len(images))
    return grad_fn(jnp.asarray(weights), types.SimpleNamespace(), batch, keys)


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_with_fewer_labels_count_less(micro_batches):
    weights, images, labels, _ = data()
    labels[[0, 4, 8, 1]] = -1  # micro-batch 0 of 4 has no label at all
    (loss, aux), grads = graded(1, images, labels, weights)
    (parts, aux_parts), grads_parts = graded(micro_batches, images, labels, weights)
    np.testing.assert_allclose(parts, loss, rtol=1e-6)
    np.testing.assert_allclose(grads_parts, grads, rtol=1e-5, atol=1e-7)
    accuracy = [one.metrics["accuracy"] for one in (aux, aux_parts)]
    np.testing.assert_allclose(*accuracy, rtol=1e-6)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_a_batch_without_labels_teaches_nothing(micro_batches):
    weights, images, labels, _ = data()
    (loss, aux), grads = graded(micro_batches, images, labels * 0 - 1, weights)
    assert float(loss) == 0 == float(aux.metrics["accuracy"])
    assert (grads == 0).all()


# The networks.


@pytest.mark.parametrize("pool, norm", [("avg", "tokens"), ("cls", "tokens")])
def test_the_head_reads_the_pooled_features(pool, norm):
    objective = plan_of("supervised").settings.objective
    encoder = dataclasses.replace(objective.encoder, norm=norm)
    objective = dataclasses.replace(objective, pool=pool, encoder=encoder)
    assert objective.feature == pool
    params = jax.tree.map(jnp.asarray, first_state("supervised").params)
    images = jnp.asarray(images_of("supervised")["image"][:2])
    floats = images.astype(jnp.float32) / 255
    tokens, _ = objective.encode(params, floats)
    pooled = tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(axis=1)
    np.testing.assert_allclose(objective.features(params, images), pooled, rtol=1e-6)
    head = params["head"]["linear"]
    want = np.asarray(pooled) @ np.asarray(head["kernel"])
    got = objective.logits(params, {}, images)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-8)
    assert got.shape == (2, 10) and np.abs(want).max() > 0
    other = params | {"head": {"linear": head | {"bias": head["bias"] + 1}}}
    np.testing.assert_allclose(objective.logits(other, {}, floats), got + 1, rtol=1e-5)


def test_a_norm_after_pooling_reads_tokens_that_are_not_normed():
    objective = plan_of("supervised").settings.objective
    assert objective.encoder.norm == "pooled"
    params = jax.tree.map(jnp.asarray, first_state("supervised").params)
    rng = np.random.default_rng(0)
    norm = {name: rng.normal(size=16) for name in ("scale", "bias")}
    given = {name: jnp.asarray(x, jnp.float32) for name, x in norm.items()}
    params["encoder"] = params["encoder"] | {"norm": given}
    images = jnp.asarray(images_of("supervised")["image"][:3])
    floats = images.astype(jnp.float32) / 255
    _, seen = objective.encode(params, floats, taps=("blocks",))
    mean = np.asarray(seen["blocks"][-1][:, 1:], np.float64).mean(axis=1)
    centred = mean - mean.mean(axis=1, keepdims=True)
    want = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-6)
    want = want * norm["scale"] + norm["bias"]
    got = objective.features(params, images)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "pool, norm, drop_path, message",
    [
        ("cls", "pooled", 0.0, "encoder.norm='pooled': want 'tokens'"),
        ("avg", "pooled", 1.0, "encoder.drop_path=1.0: want 0 <= drop_path < 1"),
    ],
)
def test_networks_that_do_not_fit_are_refused(pool, norm, drop_path, message):
    objective = plan_of("supervised").settings.objective
    encoder = dataclasses.replace(objective.encoder, norm=norm, drop_path=drop_path)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(objective, pool=pool, encoder=encoder).check_shape(
            (8, 8, 1)
        )


@pytest.mark.parametrize("fields", [dict(norm="pooled"), dict(drop_path=0.1)], ids=str)
def test_other_objectives_refuse_what_is_for_labels(fields):
    objective = plan_of("mae").settings.objective
    encoder = dataclasses.replace(objective.encoder, **fields)
    with pytest.raises(ValueError, match="an objective with labels"):
        dataclasses.replace(objective, encoder=encoder).check_shape((8, 8, 1))


# What is drawn in training.


def by_hand(logits, targets) -> float:
    logits = np.asarray(logits, np.float64)
    chances = np.exp(logits - logits.max(axis=1, keepdims=True))
    chances /= chances.sum(axis=1, keepdims=True)
    return float(-(targets * np.log(chances)).sum() / targets.sum())


def test_mixed_images_have_mixed_targets():
    # Each class has its own grey, so that a mixed image tells its share.
    weights = np.zeros((4, CLASSES), np.float32)
    objective = linear(smoothing=0.0, mix=Mix(mixup=0.8, group=4))
    assert objective.batch_coupled and not linear().batch_coupled
    images = np.repeat([0, 50, 100, 200], 4).reshape(4, 2, 2, 1).astype(np.uint8)
    labels = np.array([0, 1, 2, 3])
    seen = []

    class Seen(Linear):
        def scores(self, params, images, keys=None):
            seen.append(np.asarray(images))
            return images.reshape(len(images), -1) @ params

    fields = dataclasses.fields(objective)
    objective = Seen(**{f.name: getattr(objective, f.name) for f in fields})
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(4, CLASSES)).astype(np.float32)
    loss, aux = loss_of(objective, weights, images, labels)
    (mixed,) = seen
    share = (mixed[3, 0, 0, 0] - 0) / (200 / 255)
    want = share * images / 255 + (1 - share) * images[::-1] / 255
    np.testing.assert_allclose(mixed, want, atol=1e-6)
    assert 0.01 < share < 0.99
    targets = (
        share * np.eye(CLASSES)[labels] + (1 - share) * np.eye(CLASSES)[labels[::-1]]
    )
    logits = mixed.reshape(4, -1) @ weights
    np.testing.assert_allclose(loss, by_hand(logits, targets), rtol=1e-5)
    # An image whose partner's label is unknown counts by its own share.
    unknown = np.array([0, 1, 2, -1])
    loss, aux = loss_of(objective, weights, images, unknown)
    targets[[0, 3], 3] = 0
    np.testing.assert_allclose(aux.weight, 3, rtol=1e-5)
    np.testing.assert_allclose(loss, by_hand(logits, targets), rtol=1e-5)


def test_paths_are_dropped_in_training_and_not_in_evaluation():
    objective = plan_of("supervised").settings.objective
    encoder = dataclasses.replace(objective.encoder, drop_path=0.9)
    params = jax.tree.map(jnp.asarray, first_state("supervised").params)
    head = params["head"]["linear"]
    params["head"] = {"linear": head | {"kernel": head["kernel"] * 1e5}}
    given = images_of("supervised")
    batch = {name: jnp.asarray(given[name]) for name in ("image", "label")}
    keys = jax.random.split(jax.random.key(0), len(given["image"]))
    plain = dict(mix=Mix(), erasing=Erasing(), color_jitter="none")
    losses = {}
    for rate in (0.0, 0.9):
        encoder = dataclasses.replace(objective.encoder, drop_path=rate)
        one = dataclasses.replace(objective, encoder=encoder, **plain)
        losses[rate] = [
            float(one.loss(params, None, batch, k)[0]) for k in (keys, keys[::-1])
        ]
        logits = one.logits(params, {}, batch["image"])
        losses[rate].append(np.asarray(logits))
    assert losses[0.0][0] == losses[0.0][1]
    assert len({losses[0.9][0], losses[0.9][1], losses[0.0][0]}) == 3
    np.testing.assert_array_equal(losses[0.0][2], losses[0.9][2])


def test_erasing_is_of_the_share_of_images_asked_for():
    seen = []

    class Seen(Linear):
        def scores(self, params, images, keys=None):
            seen.append(np.asarray(images))
            return images.reshape(len(images), -1) @ params

    fields = dict(classes=CLASSES, mean=(0.5,), std=(0.25,))
    weights, images, labels, _ = data()
    for p in (0.0, 1.0):
        loss_of(Seen(**fields, erasing=Erasing(p=p)), weights, images, labels)
    plain, erased = seen
    np.testing.assert_allclose(plain, images / 255, atol=1e-6)
    assert (plain != erased).any(axis=(1, 2, 3)).mean() > 0.2


def test_the_head_starts_near_zero():
    head = first_state("supervised").params["head"]["linear"]
    assert (head["bias"] == 0).all()
    assert 1e-5 < np.std(head["kernel"]) < 3e-5
    assert sorted(first_state("supervised").params["head"]) == ["linear"]


# Errors.


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(classes=1), "classes=1: want 2 <= classes <= "),
        (dict(smoothing=1.0), "smoothing=1.0: want 0 <= smoothing < 1"),
        (dict(smoothing=-0.1), "smoothing=-0.1: want 0 <= smoothing < 1"),
    ],
)
def test_settings_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        Supervised(**fields)


def test_colours_of_grey_images_are_refused_where_they_change():
    plain = linear(mean=(0.5,), std=(0.25,))
    encoder = plan_of("supervised").settings.objective.encoder
    plain = dataclasses.replace(plain, encoder=encoder)
    plain.check_shape((8, 8, 1))
    with pytest.raises(ValueError, match="for grey images"):
        dataclasses.replace(plain, color_jitter="whole").check_shape((8, 8, 1))


def test_too_few_classes_for_the_data_are_refused():
    with pytest.raises(config.ConfigError) as caught:
        plan_of("supervised", objective__classes=9)
    assert str(caught.value) == (
        "config: objective.classes=9: data.source has 10 classes, and the loss would "
        "ignore images of the remaining ones; want objective.classes=10"
    )
    plan_of("supervised", objective__classes=11)  # as for a shared head


def test_images_without_labels_are_refused():
    tree = tree_of("supervised")
    colours = dict(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    tree.objective.update(colours)
    tree.data.source = config.choose(Source, "photos")
    with pytest.raises(config.ConfigError) as caught:
        Plan.of(tree, jax.devices()[:1])
    assert str(caught.value) == (
        "config: data.source has no labels, which Supervised reads; want a source with "
        "classes, such as digits"
    )
