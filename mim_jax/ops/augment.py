# SPDX-License-Identifier: Apache-2.0
"""Device-side image transforms: pure functions of uint8 batches already on device."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8


def normalise(
    images: UInt8[Array, "b h w c"] | Float[Array, "b h w c"],
    mean: Sequence[float],
    std: Sequence[float],
) -> Float[Array, "b h w c"]:
    """Standardised images.

    uint8 images (0..255) are scaled to 0..1 in float32 first; float images are taken
    to be in 0..1 already and keep their precision.
    """
    if images.dtype == jnp.uint8:
        images = images.astype(jnp.float32) / 255
    mean, std = jnp.asarray(mean, images.dtype), jnp.asarray(std, images.dtype)
    return (images - mean[None, None, None]) / std[None, None, None]


def denormalise(
    images: Float[Array, "b h w c"], mean: Sequence[float], std: Sequence[float]
) -> Float[Array, "b h w c"]:
    """Inverse of `normalise`: images in 0..1 (not clipped)."""
    mean, std = jnp.asarray(mean, images.dtype), jnp.asarray(std, images.dtype)
    return images * std[None, None, None] + mean[None, None, None]
