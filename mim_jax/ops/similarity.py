# SPDX-License-Identifier: Apache-2.0
"""How alike two images are."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def psnr(
    image: Float[Array, "b h w c"],
    reference: Float[Array, "b h w c"],
    region: Bool[Array, "b h w"] | None = None,
) -> Float[Array, " b"]:
    """Peak signal-to-noise ratio of each image in dB, for values in 0..1.

    -10 log10 of the mean squared error, over the pixels where `region` is True (all of
    them if None). Identical images give infinity. The mean of these values over images
    differs from the PSNR of the mean error: say which one is reported.
    """
    error = jnp.mean((image - reference) ** 2, axis=-1)
    if region is None:
        mse = error.mean(axis=(1, 2))
    else:
        weight = region.astype(error.dtype)
        mse = (error * weight).sum(axis=(1, 2)) / weight.sum(axis=(1, 2))
    return -10 * jnp.log10(mse)
