# SPDX-License-Identifier: Apache-2.0
"""Regions of feature maps, and masks that go back to where their boxes are."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


def levels(
    boxes: Float[Array, "n 4"],
    stride: float | int,
    count: int,
    first: float | int,
    side: float | int,
) -> Int[Array, " n"]:
    """The level of a pyramid from which each box is read, arXiv:1612.03144, equation 1:
    a box of twice the side is read one level higher.

    Args:
        stride: of level 0, in pixels of the image; it doubles from level to level.
        count: number of levels; the levels of other boxes are cut to 0..count - 1.
        first, side: a square of `side` pixels is read from stride `first`.
    """
    sides = jnp.maximum(boxes[:, 2:] - boxes[:, :2], 0)
    root = jnp.sqrt(sides[:, 0] * sides[:, 1])
    level = jnp.log2(root / side + 1e-8) + np.log2(first / stride)
    return jnp.clip(jnp.floor(level + 1e-6), 0, count - 1).astype(jnp.int32)


def roi_align(
    maps: Sequence[Float[Array, "_ _ c"]],
    boxes: Float[Array, "n 4"],
    level: Int[Array, " n"],
    strides: Sequence[float | int],
    side: int,
    samples: int = 2,
) -> Float[Array, "n {side} {side} c"]:
    """Features of boxes by bilinear interpolation, arXiv:1703.06870, section 3.

    A box is cut into side x side bins, and a bin is the mean of samples x samples
    places in it. The value of a map stands at the centre of its pixel ("aligned" of
    torchvision). Outside of the map values are those of its border for one pixel, then
    0.

    Args:
        maps: of one image, from fine to coarse.
        boxes: in pixels of the image.
        level: of each box: which map it is read from.
        strides: pixels of the image per pixel of each map.
    """
    rows = jnp.asarray([one.shape[0] for one in maps], jnp.int32)[level]
    cols = jnp.asarray([one.shape[1] for one in maps], jnp.int32)[level]
    starts = np.cumsum([0, *(one.shape[0] * one.shape[1] for one in maps)])
    start = jnp.asarray(starts[:-1], jnp.int32)[level]
    flat = jnp.concatenate([one.reshape(-1, one.shape[-1]) for one in maps])
    scale = jnp.asarray([1 / stride for stride in strides], boxes.dtype)[level]
    found = boxes * scale[:, None] - 0.5
    share = (np.arange(side * samples) + 0.5) / (side * samples)
    share = jnp.asarray(share, boxes.dtype)[None]
    y = found[:, 1:2] + (found[:, 3:] - found[:, 1:2]) * share
    x = found[:, :1] + (found[:, 2:3] - found[:, :1]) * share
    place_y, weight_y = _pixels(y, rows, side)
    place_x, weight_x = _pixels(x, cols, side)
    # One gather reads a bin's pixels side by side. On TPUs four, one for each corner,
    # take nearly three times as long with their gradients.
    step = cols[:, None, None, None, None]
    where = start[:, None, None, None, None] + step * place_y[:, :, None, :, None]
    where = where + place_x[:, None, :, None, :]
    weight = weight_y[:, :, None, :, None] * weight_x[:, None, :, None, :]
    shape = (len(boxes), side, side, (2 * samples) ** 2)
    seen = flat[where.reshape(shape)]
    weight = weight.reshape(shape).astype(flat.dtype) / samples**2
    return jnp.einsum("nijk,nijkc->nijc", weight, seen)


def _pixels(places, size, side: int):
    """Along one axis, the two pixels beside each place "n side*s", with their weights,
    by bin: "n side 2s"."""
    last = (size - 1)[:, None]
    inside = (places >= -1) & (places <= size[:, None].astype(places.dtype))
    places = jnp.clip(places, 0, last.astype(places.dtype))
    low = jnp.floor(places)
    weight = places - low
    low = low.astype(jnp.int32)
    pixels = jnp.stack([low, jnp.minimum(low + 1, last)], axis=-1)
    weights = jnp.stack([1 - weight, weight], axis=-1)
    weights *= inside[..., None].astype(places.dtype)
    by_bin = (len(places), side, -1)
    return pixels.reshape(by_bin), weights.reshape(by_bin)


def crop_masks(
    masks: Bool[Array, "n m m"],
    frames: Float[Array, "n 4"],
    boxes: Float[Array, "n 4"],
    side: int,
) -> Float[Array, "n {side} {side}"]:
    """The part of each mask that lies in a box, as the target of a mask head.

    Args:
        masks: each covers its frame, such as the object's own box.
        frames: of the masks, in the units of the boxes.
        boxes: one for each mask.
    Returns:
        0 or 1: whether the mask, interpolated, is at least one half there; 0 outside
        of the frame.
    """
    size = masks.shape[-1]
    sides = jnp.maximum(frames[:, 2:] - frames[:, :2], 1e-6)
    corner = jnp.concatenate([frames[:, :2], frames[:, :2]], axis=1)
    inside = (boxes - corner) / jnp.concatenate([sides, sides], axis=1) * size

    def one(mask, box):
        y = _weights(box[1], box[3], side, size)
        x = _weights(box[0], box[2], side, size)
        return y @ mask.astype(y.dtype) @ x.T

    # A weight of one half is rounded up, whatever order the sums were taken in.
    return (jax.vmap(one)(masks, inside) >= 0.5 - 1e-6).astype(boxes.dtype)


def _weights(low, high, count: int, size: int):
    """Bilinear weights "count size" of the pixels of a line of `size`, at the centres
    of `count` equal parts of low..high; beyond the line's ends are zeros."""
    share = jnp.asarray((np.arange(count) + 0.5) / count, jnp.asarray(low).dtype)
    places = low + (high - low) * share - 0.5
    pixels = jnp.arange(size, dtype=places.dtype)
    return jnp.maximum(1 - jnp.abs(places[:, None] - pixels[None]), 0)


def paste_masks(
    masks: Float[Array, "n m m"], boxes: Float[Array, "n 4"], rows: int, cols: int
) -> Float[Array, "n {rows} {cols}"]:
    """Masks of boxes as masks of the image, by bilinear interpolation at the centres of
    its pixels; 0 outside of the boxes, towards which the last half pixel of a mask
    fades. A box without area has no mask.

    Args:
        masks: 0..1, each covers its box.
        boxes: in pixels of the image.
    """

    def one(mask, box):
        y = paste_weights(box[1], box[3], rows, mask.shape[0], jnp)
        x = paste_weights(box[0], box[2], cols, mask.shape[1], jnp)
        return y.astype(mask.dtype) @ mask @ x.astype(mask.dtype).T

    return jax.vmap(one)(masks, boxes)


def paste_weights(low: Any, high: Any, count: int, size: int, xp: Any) -> Any:
    """Weights "count size" by which a line of an image reads a line of a mask.

    Args:
        low, high: where the mask begins and ends, in pixels of the image.
        count: pixels of the line of the image.
        size: pixels of the line of the mask.
        xp: numpy, for images whose sizes vary, or jax.numpy.
    """
    places = xp.arange(count, dtype=xp.float32) + np.float32(0.5)
    side = xp.maximum(high - low, 1e-6)
    places = (places - low) / side * size - 0.5
    pixels = xp.arange(size, dtype=xp.float32)
    weights = xp.maximum(1 - xp.abs(places[:, None] - pixels[None]), 0)
    return weights * xp.asarray(high > low, weights.dtype)
