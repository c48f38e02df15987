# SPDX-License-Identifier: Apache-2.0
"""PSNR against scikit-image."""

import jax.numpy as jnp
import numpy as np
from skimage.metrics import peak_signal_noise_ratio

from mim_jax.ops.similarity import psnr


def _pair():
    rng = np.random.default_rng(0)
    image = rng.random((3, 8, 10, 3)).astype(np.float32)
    noise = 0.1 * rng.standard_normal(image.shape).astype(np.float32)
    return image, np.clip(image + noise, 0, 1)


def test_psnr_is_scikit_images():
    image, other = _pair()
    wanted = [
        peak_signal_noise_ratio(a, b, data_range=1.0)
        for a, b in zip(image, other, strict=True)
    ]
    np.testing.assert_allclose(
        psnr(jnp.asarray(image), jnp.asarray(other)), wanted, 1e-5
    )


def test_psnr_of_a_region_sees_that_region_alone():
    image, other = _pair()
    region = np.zeros(image.shape[:3], bool)
    region[:, 2:5, 3:9] = True
    got = psnr(jnp.asarray(image), jnp.asarray(other), jnp.asarray(region))
    wanted = psnr(jnp.asarray(image[:, 2:5, 3:9]), jnp.asarray(other[:, 2:5, 3:9]))
    np.testing.assert_allclose(got, wanted, 1e-5)


def test_identity_is_infinite():
    image, _ = _pair()
    assert np.isposinf(psnr(jnp.asarray(image), jnp.asarray(image))).all()
