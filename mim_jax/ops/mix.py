# SPDX-License-Identifier: Apache-2.0
"""Images mixed with each other, or with noise: cutmix, mixup, random erasing."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from mim_jax.ops.patches import denormalise
from mim_jax.schema import check_ranges, within


def cutmix(
    images: Float[Array, "b h w c"], keys: Key[Array, " b"], partner: int = 1
) -> tuple[Float[Array, "b h w c"], Bool[Array, "b h w"]]:
    """Paste a box of another image of the batch into each image, arXiv:1905.04899.

    The box has the share 1 - lambda of the image's area, with lambda uniform in 0..1,
    the proportions of the image and a uniform centre. It is cut off at the border.

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
            f"cutmix of {rows} image(s) with partner={partner}: want a batch of more "
            f"than {abs(partner)} images, so that no image is its own partner"
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

    The batch is cut into groups of consecutive images. A group draws mixup or cutmix,
    and one share lambda ~ Beta(alpha, alpha). Image i of a group of n is mixed with
    image n - 1 - i. After cutmix lambda is the share of pixels that were not pasted.

    Attributes:
        mixup, cutmix: alpha of mixup and of cutmix; 0 turns it off.
        switch: share of groups that get cutmix if both are on.
        group: images per group, even; a smaller batch is one group.
    """

    mixup: float = within(0.0, least=0, most=1000)
    cutmix: float = within(0.0, least=0, most=1000)
    switch: float = within(0.5, least=0, most=1)
    group: int = within(32, least=2, most=2**20)

    def __post_init__(self):
        check_ranges(self)
        if self.group % 2:
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
            keys: one per example; a group draws by the key of its first example.
        Raises:
            ValueError: the groups do not divide the batch.
        """
        rows = len(images)
        size = min(self.group, rows)
        if rows % size or size % 2:
            raise ValueError(
                f"a batch of {rows} images in groups of mix.group={self.group}: want a "
                "multiple of that, or an even number below it"
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
    """True in a box around a random pixel; it has 1 - share of the area and is cut off
    at the borders."""

    def inside(key, length):
        side = jnp.floor(length * jnp.sqrt(1 - share)).astype(jnp.int32)
        centre = jax.random.randint(key, (), 0, length)
        place = jnp.arange(length)
        return (place >= centre - side // 2) & (place < centre + (side + 1) // 2)

    rows, cols = map(inside, jax.random.split(key), shape)
    return rows[:, None] & cols[None, :]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Erasing:
    """Random erasing, arXiv:1708.04896: noise replaces a box of the image.

    Noise is normal with the data's mean and deviation, drawn for each pixel. Ten boxes
    are drawn; the first that fits inside the image is used.

    Attributes:
        p: share of images with a box.
        area: least and greatest share of the image's area.
        ratio: least ratio of height to width; the greatest is 1 / ratio.
    """

    p: float = within(0.0, least=0, most=1)
    area: tuple[float, float] = within((0.02, 1 / 3), above=0, most=1)
    ratio: float = within(0.3, above=0, most=1)

    def __post_init__(self):
        check_ranges(self)
        least, greatest = self.area
        if least > greatest:
            raise ValueError(f"area={self.area}: want least <= greatest")

    def __call__(
        self,
        images: Float[Array, "b h w c"],
        keys: Key[Array, " b"],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> Float[Array, "b h w c"]:
        """Images in 0..1, some with a box of noise, each by its own key."""
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
