# SPDX-License-Identifier: Apache-2.0
"""Device-side image transforms: pure functions of uint8 batches already on device."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, UInt8

_SHARES = ("p", "gray_p", "blur_p", "solarize_p")
_STRENGTHS = ("brightness", "contrast", "saturation", *_SHARES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColorJitter:
    """Random colours of a whole image, as in SimSiam (arXiv:2011.10566).

    Brightness, contrast, saturation and hue change one after the other, in a random
    order, then the image may lose its colour, be blurred and be solarised. Contrast
    pulls towards the mean grey of the image. Images of one channel have brightness and
    contrast alone.

    Attributes:
        brightness, contrast, saturation: factors are uniform in 1 - it .. 1 + it,
            0 <= it <= 1.
        hue: shift in turns, uniform in -it .. it, 0 <= it <= 0.5.
        p: share of images whose colours change.
        gray_p: share of images that become grey, drawn separately.
        blur_p: share of images that are blurred, by a Gaussian.
        blur_sigma: least and greatest deviation of the Gaussian, in pixels; it is cut
            off at three times the greatest one.
        solarize_p: share of images whose values from 0.5 on are inverted.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    p: float = 0.8
    gray_p: float = 0.2
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_p: float = 0.0

    def __post_init__(self):
        for name, most in dict.fromkeys(_STRENGTHS, 1.0).items() | {("hue", 0.5)}:
            if not 0 <= getattr(self, name) <= most:
                value = getattr(self, name)
                raise ValueError(f"{name}={value}: want 0 <= {name} <= {most}")

        if (
            len(self.blur_sigma) != 2
            or not 0 < self.blur_sigma[0] <= max(self.blur_sigma) == self.blur_sigma[1]
        ):
            raise ValueError(
                f"blur_sigma={self.blur_sigma}: want 0 < least <= greatest"
            )

    def check_channels(self, channels: int) -> None:
        """ValueError if images of so many channels cannot be jittered like this."""
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
        """Jittered images, in and out in 0..1, each a function of its own key."""
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
    """Gaussian of deviation `sigma` pixels, cut off at `radius`, edges repeated."""
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


def cutmix(
    images: Float[Array, "b h w c"], keys: Key[Array, " b"], partner: int = 1
) -> tuple[Float[Array, "b h w c"], Bool[Array, "b h w"]]:
    """Paste a box of another image of the batch, arXiv:1905.04899.

    The box has the share 1 - lambda of the area, lambda uniform in 0..1, the image's
    own proportions and a uniform centre; what reaches over the border is cut off.

    Args:
        keys: one per example, for its box.
        partner: the box of example i is cut from example i + partner.
    Returns:
        The mixed images, and True at the pixels that were pasted.
    Raises:
        ValueError: an image would be its own partner.
    """
    rows, height, width, _ = images.shape
    if partner % rows == 0:
        raise ValueError(
            f"cutmix of {rows} image(s) with number {partner} after each: want a batch "
            f"of more than {abs(partner)}, so that no image is its own partner"
        )

    def box(key):
        lam_key, row_key, col_key = jax.random.split(key, 3)
        half = 0.5 * jnp.sqrt(1 - jax.random.uniform(lam_key))

        def inside(key, length):
            centre = length * jax.random.uniform(key)
            place = jnp.arange(length, dtype=jnp.float32) + 0.5
            return jnp.abs(place - centre) < length * half

        return inside(row_key, height)[:, None] & inside(col_key, width)[None, :]

    pasted = jax.vmap(box)(keys)
    others = jnp.roll(images, -partner, axis=0)
    return jnp.where(pasted[..., None], others, images), pasted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mix:
    """Mixup (arXiv:1710.09412) and cutmix (arXiv:1905.04899) of images and labels.

    A batch is taken in groups of consecutive images. A group draws one of the two and
    one share lambda ~ Beta(alpha, alpha); image i of a group of n is mixed with image
    n - 1 - i. After cutmix lambda is the share of pixels that were not pasted.

    Attributes:
        mixup, cutmix: alpha of each; 0: never that one.
        switch: share of groups that get cutmix where both are on.
        group: images per group, even; a smaller batch is one group.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    switch: float = 0.5
    group: int = 32

    def __post_init__(self):
        if min(self.mixup, self.cutmix) < 0 or not 0 <= self.switch <= 1:
            raise ValueError(
                f"mixup={self.mixup}, cutmix={self.cutmix}, switch={self.switch}: want "
                "alphas >= 0 and 0 <= switch <= 1"
            )
        if self.group < 2 or self.group % 2:
            raise ValueError(f"group={self.group}: want an even number")

    @property
    def on(self) -> bool:
        """True if any image is ever mixed."""
        return self.mixup > 0 or self.cutmix > 0

    def __call__(
        self,
        images: Float[Array, "b h w c"],
        targets: Float[Array, "b k"],
        keys: Key[Array, " b"],
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b k"]]:
        """Mixed images, and their targets mixed in the same proportion.

        Args:
            keys: one per example; a group draws by that of its first.
        Raises:
            ValueError: the batch cannot be cut into such groups.
        """
        rows = len(images)
        size = min(self.group, rows)
        if rows % size or size % 2:
            raise ValueError(
                f"a batch of {rows} images in groups of mix.group={self.group}: want a "
                "multiple, or an even batch below that"
            )
        groups = images.reshape(-1, size, *images.shape[1:])
        mixed, share = jax.vmap(self._group)(groups, keys[::size])
        share = jnp.repeat(share, size)[:, None].astype(targets.dtype)
        others = targets.reshape(-1, size, targets.shape[1])[:, ::-1]
        others = others.reshape(targets.shape)
        return mixed.reshape(images.shape), share * targets + (1 - share) * others

    def _group(
        self, images: Float[Array, "n h w c"], key: Key[Array, ""]
    ) -> tuple[Float[Array, "n h w c"], Float[Array, ""]]:
        which, mixup_key, cutmix_key, box_key = jax.random.split(key, 4)
        others = images[::-1]
        share = jnp.ones(())
        mixed = images
        if self.mixup > 0:
            share = jax.random.beta(mixup_key, self.mixup, self.mixup)
            mixed = share * images + (1 - share) * others
        if self.cutmix > 0:
            drawn = jax.random.beta(cutmix_key, self.cutmix, self.cutmix)
            box = _cut_box(box_key, images.shape[1:3], drawn)
            pasted = jnp.where(box[None, :, :, None], others, images)
            odds = self.switch if self.mixup > 0 else 1.0
            cut = jax.random.uniform(which) < odds
            mixed = jnp.where(cut, pasted, mixed)
            share = jnp.where(cut, 1 - box.mean(dtype=share.dtype), share)
        return mixed, share


def _cut_box(
    key: Key[Array, ""], shape: tuple[int, ...], share: Float[Array, ""]
) -> Bool[Array, "h w"]:
    """True in a box of 1 - share of the area around a random pixel, cut at borders."""

    def inside(key, length):
        side = jnp.floor(length * jnp.sqrt(1 - share)).astype(jnp.int32)
        centre = jax.random.randint(key, (), 0, length)
        place = jnp.arange(length)
        return (place >= centre - side // 2) & (place < centre + (side + 1) // 2)

    rows, cols = map(inside, jax.random.split(key), shape)
    return rows[:, None] & cols[None, :]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Erasing:
    """Random erasing, arXiv:1708.04896: a box of noise in place of the image.

    Noise is normal with the data's mean and deviation, drawn for each pixel. Of ten
    boxes the first that fits inside the image is taken.

    Attributes:
        p: share of images with a box.
        area: least and greatest share of the image's area.
        ratio: least ratio of height to width; the greatest is 1 / ratio.
    """

    p: float = 0.0
    area: tuple[float, float] = (0.02, 1 / 3)
    ratio: float = 0.3

    def __post_init__(self):
        if not 0 <= self.p <= 1 or not 0 < self.ratio <= 1:
            raise ValueError(
                f"p={self.p}, ratio={self.ratio}: want 0 <= p <= 1 and 0 < ratio <= 1"
            )
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ValueError(f"area={self.area}: want 0 < least <= greatest <= 1")

    def __call__(
        self,
        images: Float[Array, "b h w c"],
        keys: Key[Array, " b"],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> Float[Array, "b h w c"]:
        """Images in 0..1 with noise in some places, each a function of its own key."""
        _, rows, cols, channels = images.shape
        shape = (rows, cols, channels)
        boxes = jax.vmap(lambda key: self._box(key, (rows, cols)))(keys)
        draw = functools.partial(jax.random.normal, shape=shape, dtype=images.dtype)
        noise = jax.vmap(lambda key: draw(jax.random.fold_in(key, 0)))(keys)
        noise = denormalise(noise, mean, std)
        return jnp.where(boxes[..., None], noise, images)

    def _box(self, key: Key[Array, ""], shape: tuple[int, int]) -> Bool[Array, "h w"]:
        keys = jax.random.split(jax.random.fold_in(key, 1), 4)
        erase = jax.random.uniform(keys[0]) < self.p
        rows, cols = shape
        least, most = (share * rows * cols for share in self.area)
        area = jax.random.uniform(keys[1], (10,), minval=least, maxval=most)
        bound = -math.log(self.ratio)
        log = jax.random.uniform(keys[2], (10,), minval=-bound, maxval=bound)
        heights = jnp.round(jnp.sqrt(area * jnp.exp(log))).astype(jnp.int32)
        widths = jnp.round(jnp.sqrt(area / jnp.exp(log))).astype(jnp.int32)
        fits = (heights < rows) & (widths < cols)
        first = fits.argmax()
        height, width = heights[first], widths[first]

        def inside(key, length, side):
            start = jax.random.randint(key, (), 0, jnp.maximum(length - side, 0) + 1)
            place = jnp.arange(length)
            return (place >= start) & (place < start + side)

        down_key, across_key = jax.random.split(keys[3])
        down, across = inside(down_key, rows, height), inside(across_key, cols, width)
        return down[:, None] & across[None, :] & erase & fits.any()


def luma(images: Float[Array, "*b c"]) -> Float[Array, "*b 1"]:
    """Grey value of colours by ITU-R 601: .299 red + .587 green + .114 blue."""
    if images.shape[-1] == 1:
        return images
    weights = jnp.array([0.299, 0.587, 0.114], images.dtype)
    return jnp.einsum("...c,c->...", images, weights)[..., None]


def adjust_brightness(image: Float[Array, "h w c"], factor) -> Float[Array, "h w c"]:
    """Every value times the factor, clipped to 0..1."""
    return jnp.clip(image * factor, 0, 1)


def adjust_contrast(image: Float[Array, "h w c"], factor) -> Float[Array, "h w c"]:
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
    """uint8 images to floats in 0..1; float images are in 0..1 already and unchanged.

    Raises:
        TypeError: images of another type, such as int32.
    """
    if images.dtype == jnp.uint8:
        return images.astype(jnp.float32) / 255
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(
            f"images are {images.dtype}: want uint8 in 0..255, or floats in 0..1"
        )
    return images


def normalise(
    images: Float[Array, "b h w c"],
    mean: Sequence[float],
    std: Sequence[float],
) -> Float[Array, "b h w c"]:
    """Standardised images, from values in 0..1.

    Raises:
        TypeError: the values are integers; `to_float` makes uint8 ones floats.
    """
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(
            f"images are {images.dtype}: want floats in 0..1, such as to_float returns"
        )
    centre, scale = _per_channel(mean, images), _per_channel(std, images)
    return (images - centre) / scale


def denormalise(
    images: Float[Array, "b h w c"], mean: Sequence[float], std: Sequence[float]
) -> Float[Array, "b h w c"]:
    """Inverse of `normalise`: images in 0..1 (not clipped)."""
    return images * _per_channel(std, images) + _per_channel(mean, images)


def _per_channel(values: Sequence[float], images: Array) -> Float[Array, "1 1 1 c"]:
    return jnp.asarray(values, images.dtype)[None, None, None]
