# SPDX-License-Identifier: Apache-2.0
"""Device-side image transforms: pure functions of uint8 batches already on device."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8

_STRENGTHS = ("brightness", "contrast", "saturation", "p", "gray_p")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColorJitter:
    """Random colours of a whole image, as in SimSiam (arXiv:2011.10566).

    Brightness, contrast, saturation and hue change one after the other, in a random
    order, then the image may lose its colour. Contrast pulls towards the mean grey of
    the image.

    Attributes:
        brightness, contrast, saturation: factors are uniform in 1 - it .. 1 + it,
            0 <= it <= 1.
        hue: shift in turns, uniform in -it .. it, 0 <= it <= 0.5.
        p: share of images whose colours change.
        gray_p: share of images that become grey, drawn separately.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    p: float = 0.8
    gray_p: float = 0.2

    def __post_init__(self):
        for name, most in dict.fromkeys(_STRENGTHS, 1.0).items() | {("hue", 0.5)}:
            if not 0 <= getattr(self, name) <= most:
                value = getattr(self, name)
                raise ValueError(f"{name}={value}: want 0 <= {name} <= {most}")

    def __call__(
        self, images: Float[Array, "b h w 3"], keys: Key[Array, " b"]
    ) -> Float[Array, "b h w 3"]:
        """Jittered images, in and out in 0..1, each a function of its own key."""
        return jax.vmap(self._one)(images, keys)

    def _one(
        self, image: Float[Array, "h w 3"], key: Key[Array, ""]
    ) -> Float[Array, "h w 3"]:
        order_key, amount_key, p_key, gray_key = jax.random.split(key, 4)
        spread = jnp.array([self.brightness, self.contrast, self.saturation, self.hue])
        amounts = jax.random.uniform(amount_key, (4,), minval=-spread, maxval=spread)
        changes = [
            lambda x: adjust_brightness(x, 1 + amounts[0]),
            lambda x: adjust_contrast(x, 1 + amounts[1]),
            lambda x: adjust_saturation(x, 1 + amounts[2]),
            lambda x: adjust_hue(x, amounts[3]),
        ]
        jittered = image
        for which in jax.random.permutation(order_key, 4):
            jittered = jax.lax.switch(which, changes, jittered)
        image = jnp.where(jax.random.uniform(p_key) < self.p, jittered, image)
        grey = jnp.broadcast_to(luma(image), image.shape)
        return jnp.where(jax.random.uniform(gray_key) < self.gray_p, grey, image)


def luma(images: Float[Array, "*b 3"]) -> Float[Array, "*b 1"]:
    """Grey value of colours by ITU-R 601: .299 red + .587 green + .114 blue."""
    weights = jnp.array([0.299, 0.587, 0.114], images.dtype)
    return jnp.einsum("...c,c->...", images, weights)[..., None]


def adjust_brightness(image: Float[Array, "h w 3"], factor) -> Float[Array, "h w 3"]:
    """Every value times the factor, clipped to 0..1."""
    return jnp.clip(image * factor, 0, 1)


def adjust_contrast(image: Float[Array, "h w 3"], factor) -> Float[Array, "h w 3"]:
    """Distances from the image's mean grey value times the factor, clipped to 0..1."""
    mean = luma(image).mean()
    return jnp.clip(mean + (image - mean) * factor, 0, 1)


def adjust_saturation(image: Float[Array, "h w 3"], factor) -> Float[Array, "h w 3"]:
    """Distances from each pixel's grey value times the factor, clipped to 0..1."""
    grey = luma(image)
    return jnp.clip(grey + (image - grey) * factor, 0, 1)


def adjust_hue(image: Float[Array, "h w 3"], turns) -> Float[Array, "h w 3"]:
    """Hue of the HSV colour turned; 1 is once around."""
    value = image.max(axis=-1)
    chroma = value - image.min(axis=-1)
    safe = jnp.where(chroma > 0, chroma, 1)
    red, green, blue = jnp.moveaxis(image, -1, 0)
    sextant = jnp.where(
        value == red,
        (green - blue) / safe,
        jnp.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = sextant + 6 * turns
    # A channel falls from value to value - chroma and back as the hue goes around.
    offset = jnp.array([[[5, 3, 1]]], image.dtype)
    place = (offset + hue[..., None]) % 6
    depth = jnp.clip(jnp.minimum(place, 4 - place), 0, 1)
    return value[..., None] - chroma[..., None] * depth


def to_float(
    images: UInt8[Array, "b h w c"] | Float[Array, "b h w c"],
) -> Float[Array, "b h w c"]:
    """0..255 to 0..1 in float32; float images are taken to be in 0..1 already."""
    return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images


def normalise(
    images: Float[Array, "b h w c"],
    mean: Sequence[float],
    std: Sequence[float],
) -> Float[Array, "b h w c"]:
    """Standardised images, from values in 0..1."""
    centre, scale = _per_channel(mean, images), _per_channel(std, images)
    return (images - centre) / scale


def denormalise(
    images: Float[Array, "b h w c"], mean: Sequence[float], std: Sequence[float]
) -> Float[Array, "b h w c"]:
    """Inverse of `normalise`: images in 0..1 (not clipped)."""
    return images * _per_channel(std, images) + _per_channel(mean, images)


def _per_channel(values: Sequence[float], images: Array) -> Float[Array, "1 1 1 c"]:
    return jnp.asarray(values, images.dtype)[None, None, None]
