# SPDX-License-Identifier: Apache-2.0
import functools
import math

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from by_hand import unit

from mim_jax.ops.contrastive import cosine_distance, info_nce
from mim_jax.sharding import Mesh, by_row

TAU = 0.2
NEGATIVES = ["same_position", "same_image", "all"]


def draw(images=8, positions=5, width=6, seed=0):
    """Tokens of two branches, alike to some degree and of any length."""
    random = np.random.RandomState(seed)
    query = random.standard_normal((images, positions, width))
    key = 0.3 * query + random.standard_normal(query.shape)
    return query, key * random.uniform(0.1, 10, (images, positions, 1))


losses_of = jax.jit(info_nce, static_argnames=("temperature", "negatives", "chunk"))


@functools.partial(jax.jit, static_argnames=("negatives", "chunk"))
def losses_and_gradients(query, key, *, negatives="same_position", chunk=14):
    """Loss per token, and the gradient in query and key of their sum with weights."""

    def total(query, key):
        losses = losses_of(query, key, TAU, negatives, chunk)
        return (losses * jnp.asarray(weights(losses.shape), losses.dtype)).sum(), losses

    (_, losses), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(
        query, key
    )
    return losses, grads


def weights(shape):
    return np.random.RandomState(9).uniform(size=shape)


def narrow(*arrays):
    return [jnp.asarray(array, jnp.float32) for array in arrays]


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_loss_and_gradient_by_loops_whatever_the_chunk(negatives):
    query, key = draw()
    expected = by_hand.info_nce(unit(query), unit(key), negatives, TAU)
    # Along a random direction, by a difference quotient.
    along = [np.random.RandomState(seed).standard_normal(key.shape) for seed in (1, 2)]

    def total(step):
        moved = [x + step * d for x, d in zip((query, key), along, strict=True)]
        return (
            weights(key.shape[:2]) * by_hand.info_nce(*map(unit, moved), negatives, TAU)
        ).sum()

    expected_slope = (total(1e-5) - total(-1e-5)) / 2e-5
    assert abs(expected_slope) > 1
    whole = None
    for chunk in (14, 1, 2):  # 2 of 5 positions: the last round is half empty
        losses, grads = losses_and_gradients(
            *narrow(query, key), negatives=negatives, chunk=chunk
        )
        assert losses.dtype == jnp.float32
        np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)
        slope = sum((grad * d).sum() for grad, d in zip(grads, along, strict=True))
        assert math.isclose(slope, expected_slope, rel_tol=1e-4)
        whole = whole or grads
        for mine, unchunked in zip(grads, whole, strict=True):
            largest = jnp.abs(unchunked).max()
            np.testing.assert_allclose(mine, unchunked, rtol=0, atol=1e-5 * largest)


def test_identical_features_give_the_logarithm_of_the_number_of_keys():
    same = jnp.ones((6, 10, 4)) * jnp.array([[[0.3, -2.0, 0.1, 5.0]]])
    for negatives, keys in [("same_position", 6), ("same_image", 10), ("all", 60)]:
        losses = losses_of(same, 3 * same, TAU, negatives, chunk=4)
        np.testing.assert_allclose(losses, math.log(keys), rtol=1e-6)


@pytest.mark.parametrize("tau", [0.1, 0.2, 1.0])
def test_orthonormal_images_leave_what_the_temperature_leaves(tau):
    images = 5
    features = jnp.broadcast_to(jnp.eye(images)[:, None], (images, 3, images))
    losses = losses_of(features, features, tau)
    expected = math.log(1 + (images - 1) * math.exp(-1 / tau))
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=2e-6)


def test_one_token_per_image_is_moco_v3():
    """Algorithm 1 of arXiv:2104.02057: 2 tau CrossEntropy(q k' / tau, arange)."""
    query, key = draw(positions=1, images=7)
    logits = unit(query[:, 0]) @ unit(key[:, 0]).T / TAU
    expected = -2 * TAU * np.diag(scipy.special.log_softmax(logits, axis=1)).mean()
    loss = 2 * TAU * losses_of(*narrow(query, key), TAU).mean()
    assert math.isclose(loss, expected, rel_tol=1e-5)


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_rows_on_eight_devices_are_one_batch(negatives):
    query, key = narrow(*draw())
    one, ones = losses_and_gradients(query, key, negatives=negatives, chunk=2)
    rows = by_row(Mesh().build())
    query, key = jax.device_put((query, key), rows)
    many, manys = losses_and_gradients(query, key, negatives=negatives, chunk=2)
    assert len(query.sharding.device_set) == 8
    assert len(many.sharding.device_set) == 8
    np.testing.assert_allclose(many, one, atol=1e-5)
    for mine, theirs in zip(manys, ones, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5 * jnp.abs(theirs).max())


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_bfloat16_rounds_the_rows_and_nothing_after(negatives):
    query, key = (x.astype(jnp.bfloat16) for x in narrow(*draw(width=64)))
    losses = losses_of(query, key, TAU, negatives, chunk=2)
    assert losses.dtype == jnp.float32
    rounded = [
        unit(np.asarray(x, np.float64)).astype(jnp.bfloat16).astype(np.float64)
        for x in (query, key)
    ]
    np.testing.assert_allclose(
        losses, by_hand.info_nce(*rounded, negatives, TAU), atol=1e-4
    )
    fine = by_hand.info_nce(*map(unit, draw(width=64)), negatives, TAU)
    np.testing.assert_allclose(losses, fine, atol=0.03)


def test_a_row_of_zeros_has_a_finite_gradient():
    query, key = narrow(*draw())
    losses, grads = losses_and_gradients(query.at[0, 0].set(0), key)
    assert all(jnp.isfinite(x).all() for x in (losses, *grads))
    assert math.isclose(losses[0, 0], math.log(8), rel_tol=1e-6)


def test_byol_is_zero_for_equal_and_four_for_opposite_directions():
    query, key = draw()
    equal = cosine_distance(*narrow(query, 3 * query))
    np.testing.assert_allclose(equal, 0, atol=1e-6)
    opposite = cosine_distance(*narrow(query, -0.2 * query))
    np.testing.assert_allclose(opposite, 4, rtol=1e-6)
    # ||q - k||^2 of the two unit vectors, arXiv:2006.07733, Eq. (2).
    expected = ((unit(query) - unit(key)) ** 2).sum(axis=-1)
    between = cosine_distance(*narrow(query, key))
    np.testing.assert_allclose(between, expected, rtol=1e-5)
    short = [x.astype(jnp.bfloat16) for x in narrow(query, key)]
    coarse = cosine_distance(*short)
    assert coarse.dtype == jnp.float32
    expected = unit(np.asarray(short[0], np.float64)) - unit(
        np.asarray(short[1], np.float64)
    )
    np.testing.assert_allclose(coarse, (expected**2).sum(axis=-1), atol=1e-5)


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"chunk": 0}])
def test_sizes_out_of_range_are_refused(wrong):
    query, key = narrow(*draw(images=2))
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"{name}={value}"):
        info_nce(query, key, **{"temperature": TAU} | wrong)
