# SPDX-License-Identifier: Apache-2.0
"""The linear probe's norm, its statistics and what stays frozen."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import bits, first_state, images_of, one_step, plan_of

from mim_jax.objectives.probe import Probe

WIDTH, CLASSES = 6, 4


class Given(Probe):
    """Features are the pixels."""

    def features(self, params, images, keys=None):
        return images.reshape(len(images), -1).astype(jnp.float32)


def given(**fields) -> Probe:
    return Given(**(dict(classes=CLASSES, mean=(0.5,), std=(0.25,)) | fields))


def setup(rows: int = 10):
    """(params, stats, uint8 images, labels)."""
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(WIDTH, CLASSES)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=CLASSES), jnp.float32)
    stats = {
        "mean": jnp.asarray(rng.normal(size=WIDTH), jnp.float32),
        "variance": jnp.asarray(rng.random(WIDTH) + 1, jnp.float32),
    }
    images = rng.integers(0, 256, (rows, 2, 3, 1), dtype=np.uint8)
    labels = rng.integers(0, CLASSES, rows).astype(np.int32)
    params = {"head": {"linear": {"kernel": kernel, "bias": bias}}}
    return params, stats, images, labels


def log_loss(logits, labels) -> float:
    chances = np.exp(logits - logits.max(axis=1, keepdims=True))
    chances /= chances.sum(axis=1, keepdims=True)
    return float(-np.log(chances[np.arange(len(labels)), labels]).mean())


def test_training_uses_the_batch_and_evaluation_what_was_kept():
    params, stats, images, labels = setup()
    head = {k: np.asarray(v, np.float64) for k, v in params["head"]["linear"].items()}
    x = images.reshape(10, -1).astype(np.float64)
    batch = {"image": jnp.asarray(images), "label": jnp.asarray(labels)}
    keys = jax.random.split(jax.random.key(0), 10)
    state = types.SimpleNamespace(stats=stats)
    loss, aux = given().loss(params, state, batch, keys)
    standard = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-6)
    logits = standard @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(loss, log_loss(logits, labels), rtol=1e-5)
    right = (logits.argmax(axis=1) == labels).mean()
    np.testing.assert_allclose(aux.metrics["accuracy"], right, rtol=1e-6)
    # A tenth of each batch, its variance with divisor n - 1.
    old = {name: np.asarray(leaf, np.float64) for name, leaf in stats.items()}
    want = 0.9 * old["mean"] + 0.1 * x.mean(axis=0)
    np.testing.assert_allclose(aux.stats["mean"], want, rtol=1e-5)
    want = 0.9 * old["variance"] + 0.1 * x.var(axis=0, ddof=1)
    np.testing.assert_allclose(aux.stats["variance"], want, rtol=1e-5)
    got = given().logits(params, stats, jnp.asarray(images))
    want = (x - old["mean"]) / np.sqrt(old["variance"] + 1e-6)
    want = want @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_images_without_labels_do_not_count():
    params, stats, images, labels = setup()
    state = types.SimpleNamespace(stats=stats)
    keys = jax.random.split(jax.random.key(0), 10)
    unknown = np.where(np.arange(10) < 4, -1, labels)
    batch = {"image": jnp.asarray(images), "label": jnp.asarray(unknown)}
    loss, aux = given().loss(params, state, batch, keys)
    x = images.reshape(10, -1).astype(np.float64)
    standard = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-6)
    head = {k: np.asarray(v, np.float64) for k, v in params["head"]["linear"].items()}
    logits = standard @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(loss, log_loss(logits[4:], labels[4:]), rtol=1e-5)
    assert float(aux.weight) == 6


def test_the_encoder_is_frozen_and_the_optimiser_keeps_nothing_of_it():
    plan = plan_of("probe")
    assert plan.settings.objective.frozen == ("encoder",)
    after, _ = one_step("probe", plan)
    old, new = bits(first_state("probe").params), bits(after.params)
    changed = {path for path in old if old[path] != new[path]}
    assert changed == {"head/linear/kernel", "head/linear/bias"}
    kept = [path for path in bits(after.opt_state) if "encoder" in path]
    assert not kept
    sizes = sum(x.size for x in jax.tree.leaves(after.opt_state))
    assert sizes < 2 * 10 * (16 + 1)


def test_the_statistics_follow_the_batches():
    after, _ = one_step("probe", plan_of("probe"))
    objective = plan_of("probe").settings.objective
    images = jnp.asarray(images_of("probe")["image"])
    params = jax.tree.map(jnp.asarray, first_state("probe").params)
    features = np.asarray(objective.features(params, images), np.float64)
    np.testing.assert_allclose(
        after.stats["mean"], 0.1 * features.mean(axis=0), rtol=1e-3, atol=1e-6
    )
    want = 0.9 + 0.1 * features.var(axis=0, ddof=1)
    np.testing.assert_allclose(after.stats["variance"], want, rtol=1e-4)


@pytest.mark.parametrize(
    "fields", [dict(classes=1), dict(momentum=0.0), dict(deviation=0.0)], ids=str
)
def test_settings_out_of_range_are_refused(fields):
    with pytest.raises(ValueError, match="want"):
        given(**fields)
