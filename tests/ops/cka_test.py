# SPDX-License-Identifier: Apache-2.0
"""CKA from moments against the n x n definitions in float64, and its invariances."""

import numpy as np
import pytest

from mim_jax.ops.cka import Moments

RNG = np.random.default_rng(0)
N, D = 40, 7
F = RNG.normal(3, 1, (2, N, D))
G = F @ RNG.normal(size=(D, D)) + RNG.normal(size=(2, N, D))


def moments(f, g, batch=N):
    found = Moments(f.shape[0], f.shape[2])
    for i in range(0, f.shape[1], batch):
        found.add(f[:, i : i + batch], g[:, i : i + batch])
    return found


def plain(f, g):
    """By n x n Gram matrices, centred on both sides."""
    centre = np.eye(len(f)) - 1 / len(f)
    k, m = centre @ f @ f.T @ centre, centre @ g @ g.T @ centre
    return (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())


def debiased(f, g):
    """Song et al.'s Eq. (5), term by term."""

    def hsic(k, m):
        n = len(k)
        k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
        one = np.ones(n)
        value = np.trace(k @ m)
        value += (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        value -= 2 / (n - 2) * (one @ k @ m @ one)
        return value / (n * (n - 3))

    k, m = f @ f.T, g @ g.T
    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


@pytest.mark.parametrize("name, reference", [("plain", plain), ("debiased", debiased)])
@pytest.mark.parametrize("batch", [N, 13, 1])
def test_equals_the_definition_for_any_batch(name, reference, batch):
    expected = [reference(f, g) for f, g in zip(F, G, strict=True)]
    found = getattr(moments(F, G, batch), name)()
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    assert all(0.1 < value < 0.99 for value in expected)


@pytest.mark.parametrize("name", ["plain", "debiased"])
def test_one_for_rotated_scaled_and_shifted_features(name):
    rotation = np.linalg.qr(RNG.normal(size=(D, D)))[0]
    found = getattr(moments(F, 5 * F @ rotation - 100), name)()
    np.testing.assert_allclose(found, 1, rtol=1e-10)
    np.testing.assert_allclose(getattr(moments(F, F), name)(), 1, rtol=1e-12)


def test_debiased_is_near_zero_for_unrelated_features_and_plain_is_not():
    f, g = RNG.normal(size=(2, 1, 60, 30))
    found = moments(f, g)
    assert abs(found.debiased()[0]) < 0.1 and found.plain()[0] > 0.2


@pytest.mark.parametrize("name, least", [("plain", 2), ("debiased", 4)])
def test_too_few_examples(name, least):
    with pytest.raises(ValueError, match=f"want at least {least}"):
        getattr(moments(F[:, : least - 1], G[:, : least - 1]), name)()
