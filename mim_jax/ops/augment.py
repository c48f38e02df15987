# SPDX-License-Identifier: Apache-2.0
"""Random changes of colour, on the device, for images in 0..1."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from mim_jax.schema import check_ranges, within

_SHARES = ("p", "gray_p", "blur_p", "solarize_p")
_STRENGTHS = ("brightness", "contrast", "saturation", *_SHARES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColorJitter:
    """Random changes of a whole image's colours, as in SimSiam (arXiv:2011.10566).

    Brightness, contrast, saturation and hue change in a random order. Then, each with
    its own probability, the image turns grey, is blurred and is solarised. Contrast
    scales the distance from the image's mean grey value. In images of one channel only
    brightness and contrast change.

    Attributes:
        brightness, contrast, saturation: s; the factor is uniform in 1 - s .. 1 + s,
            0 <= s <= 1.
        hue: h; the shift is uniform in -h .. h turns, 0 <= h <= 0.5.
        p: share of images whose colours change.
        gray_p: share of images that turn grey, drawn independently of `p`.
        blur_p: share of images that a Gaussian blurs.
        blur_sigma: least and greatest deviation of the Gaussian, in pixels. The
            Gaussian is cut off at three times the greatest deviation.
        solarize_p: share of images in which values of 0.5 and above are inverted.
    """

    brightness: float = within(0.4, least=0, most=10)
    contrast: float = within(0.4, least=0, most=10)
    saturation: float = within(0.4, least=0, most=10)
    hue: float = within(0.1, least=0, most=0.5)
    p: float = within(0.8, least=0, most=1)
    gray_p: float = within(0.2, least=0, most=1)
    blur_p: float = within(0.0, least=0, most=1)
    blur_sigma: tuple[float, float] = within((0.1, 2.0), least=0.01, most=100)
    solarize_p: float = within(0.0, least=0, most=1)

    def __post_init__(self):
        check_ranges(self)
        least, greatest = self.blur_sigma
        if least > greatest:
            raise ValueError(f"blur_sigma={self.blur_sigma}: want least <= greatest")

    def check_channels(self, channels: int) -> None:
        """ValueError if these settings do not fit images of `channels` channels."""
        if channels == 1 and (self.saturation, self.hue, self.gray_p) != (0, 0, 0):
            raise ValueError(
                f"jitter.saturation={self.saturation}, jitter.hue={self.hue}, "
                f"jitter.gray_p={self.gray_p} for grey images: want 0 for all three"
            )
        if channels not in (1, 3):
            raise ValueError(
                f"color jitter for images of {channels} channels: want 1 or 3, or "
                "color_jitter='none'"
            )

    def __call__(
        self, images: Float[Array, "b h w c"], keys: Key[Array, " b"]
    ) -> Float[Array, "b h w c"]:
        """Jittered images in 0..1, each by its own key; the input is in 0..1 too."""
        return jax.vmap(self._one)(images, keys)

    def _one(
        self, image: Float[Array, "h w c"], key: Key[Array, ""]
    ) -> Float[Array, "h w c"]:
        keys = jax.random.split(key, 6)
        order_key, amount_key, p_key, gray_key, blur_key, solarize_key = keys
        spread = jnp.array([self.brightness, self.contrast, self.saturation, self.hue])
        amounts = jax.random.uniform(amount_key, (4,), minval=-spread, maxval=spread)
        changes = [
            lambda x: adjust_brightness(x, 1 + amounts[0]),
            lambda x: adjust_contrast(x, 1 + amounts[1]),
            lambda x: adjust_saturation(x, 1 + amounts[2]),
            lambda x: adjust_hue(x, amounts[3]),
        ]
        coloured = image.shape[-1] > 1
        changes = changes if coloured else changes[:2]
        jittered = image
        for which in jax.random.permutation(order_key, len(changes)):
            jittered = jax.lax.switch(which, changes, jittered)
        image = jnp.where(jax.random.uniform(p_key) < self.p, jittered, image)
        if coloured:
            grey = jnp.broadcast_to(luma(image), image.shape)
            image = jnp.where(jax.random.uniform(gray_key) < self.gray_p, grey, image)
        if self.blur_p > 0:
            blur_key, sigma_key = jax.random.split(blur_key)
            least, most = self.blur_sigma
            sigma = jax.random.uniform(sigma_key, minval=least, maxval=most)
            blurred = gaussian_blur(image, sigma, radius=math.ceil(3 * most))
            image = jnp.where(
                jax.random.uniform(blur_key) < self.blur_p, blurred, image
            )
        if self.solarize_p > 0:
            chosen = jax.random.uniform(solarize_key) < self.solarize_p
            image = jnp.where(chosen & (image >= 0.5), 1 - image, image)
        return image


def gaussian_blur(
    image: Float[Array, "h w c"], sigma: Float[Array, ""], radius: int
) -> Float[Array, "h w c"]:
    """The image blurred by a Gaussian of deviation `sigma` pixels.

    The Gaussian is cut off at `radius` pixels; edge pixels are repeated outwards.
    """
    offsets = jnp.arange(-radius, radius + 1, dtype=image.dtype)
    weights = jnp.exp(-0.5 * (offsets / sigma) ** 2)
    weights = weights / weights.sum()
    for axis in (0, 1):
        pads = [(radius, radius) if axis == i else (0, 0) for i in range(3)]
        padded = jnp.pad(image, pads, mode="edge")
        length = image.shape[axis]
        image = sum(
            (
                weights[i] * jax.lax.slice_in_dim(padded, i, i + length, axis=axis)
                for i in range(2 * radius + 1)
            ),
            start=jnp.zeros_like(image),
        )
    return image


def luma(images: Float[Array, "*b c"]) -> Float[Array, "*b 1"]:
    """Grey value of colours by ITU-R 601: .299 red + .587 green + .114 blue."""
    if images.shape[-1] == 1:
        return images
    weights = jnp.array([0.299, 0.587, 0.114], images.dtype)
    return jnp.einsum("...c,c->...", images, weights)[..., None]


def adjust_brightness(image: Float[Array, "h w c"], factor) -> Float[Array, "h w c"]:
    """Multiplies every value by the factor; clips to 0..1."""
    return jnp.clip(image * factor, 0, 1)


def adjust_contrast(image: Float[Array, "h w c"], factor) -> Float[Array, "h w c"]:
    """Scales distances from the image's mean grey value; clips to 0..1."""
    mean = luma(image).mean()
    return jnp.clip(mean + (image - mean) * factor, 0, 1)


def adjust_saturation(image: Float[Array, "h w 3"], factor) -> Float[Array, "h w 3"]:
    """Scales distances from each pixel's own grey value; clips to 0..1."""
    grey = luma(image)
    return jnp.clip(grey + (image - grey) * factor, 0, 1)


def adjust_hue(image: Float[Array, "h w 3"], turns) -> Float[Array, "h w 3"]:
    """Rotates the hue of each pixel's HSV colour; 1 turn is the full circle."""
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
    # As the hue goes round the circle, a channel falls from value to value - chroma
    # and rises again.
    offset = jnp.array([[[5, 3, 1]]], image.dtype)
    place = (offset + hue[..., None]) % 6
    depth = jnp.clip(jnp.minimum(place, 4 - place), 0, 1)
    return value[..., None] - chroma[..., None] * depth
