# SPDX-License-Identifier: Apache-2.0
"""Boxes: areas, overlaps, coding by anchors, and anchors themselves.

A box is left, top, right, bottom (x1, y1, x2, y2) in pixels, as corners of the plane:
the pixel in row 0 and column 0 covers the box 0, 0, 1, 1. A box whose right is not
above its left, or whose bottom is not above its top, has no area. All functions are of
one image and have static shapes; `jax.vmap` makes them functions of a batch.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# Largest logarithm by which a decoded side may exceed its anchor's: 1000 pixels from
# 16. Wider ones would overflow in half precision.
LARGEST = math.log(1000 / 16)


def area(boxes: Float[Array, "n 4"]) -> Float[Array, " n"]:
    """Area of each box in square pixels; 0 of a box without area."""
    sides = jnp.maximum(boxes[:, 2:] - boxes[:, :2], 0)
    return sides[:, 0] * sides[:, 1]


def iou(a: Float[Array, "n 4"], b: Float[Array, "m 4"]) -> Float[Array, "n m"]:
    """Intersection over union of every pair; 0 where neither box has an area.

    Example:
        >>> one = jnp.array([[0.0, 0.0, 2.0, 2.0]])
        >>> float(iou(one, one + 1)[0, 0])  # 1 of 7 square pixels
        0.1428571492433548
    """
    low = jnp.maximum(a[:, None, :2], b[None, :, :2])
    high = jnp.minimum(a[:, None, 2:], b[None, :, 2:])
    sides = jnp.maximum(high - low, 0)
    both = sides[..., 0] * sides[..., 1]
    union = area(a)[:, None] + area(b)[None] - both
    return jnp.where(union > 0, both / jnp.where(union > 0, union, 1), 0)


def clip(boxes: Float[Array, "n 4"], size: Float[Array, " 2"]) -> Float[Array, "n 4"]:
    """Boxes cut to an image.

    Args:
        size: rows and columns.
    """
    most = jnp.stack([size[1], size[0], size[1], size[0]])[None]
    return jnp.clip(boxes, 0, most)


def encode(
    boxes: Float[Array, "n 4"],
    anchors: Float[Array, "n 4"],
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
) -> Float[Array, "n 4"]:
    """Boxes as offsets from anchors, arXiv:1311.2524, appendix C: shifts of the centre
    in sides of the anchor, and logarithms of the ratios of the sides.

    Where a box or its anchor has no area, sides count as at least 1e-6 pixels, so that
    all numbers are finite.

    Args:
        weights: factors of the shifts in x and y and of the two logarithms.
    """
    (middle, side), (centre, unit) = _centred(boxes), _centred(anchors)
    shift = (middle - centre) / unit
    codes = jnp.concatenate([shift, jnp.log(side / unit)], axis=1)
    return codes * jnp.asarray(weights, codes.dtype)[None]


def decode(
    codes: Float[Array, "n 4"],
    anchors: Float[Array, "n 4"],
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
) -> Float[Array, "n 4"]:
    """The boxes that `encode` codes; logarithms are cut to `LARGEST`."""
    codes = codes / jnp.asarray(weights, codes.dtype)[None]
    centre, unit = _centred(anchors)
    middle = centre + codes[:, :2] * unit
    half = jnp.exp(jnp.minimum(codes[:, 2:], LARGEST)) * unit / 2
    return jnp.concatenate([middle - half, middle + half], axis=1)


def _centred(boxes):
    """Centres and sides, "n 2" both, as x and y."""
    low, high = boxes[:, :2], boxes[:, 2:]
    return (low + high) / 2, jnp.maximum(high - low, 1e-6)


def anchors(
    grid: tuple[int, int],
    stride: float | int,
    side: float | int,
    ratios: Sequence[float],
) -> Float[np.ndarray, "n 4"]:
    """Anchors around the centre of every place of a feature map.

    Args:
        grid: rows and columns of the map.
        stride: pixels of the image per place.
        side: root of an anchor's area.
        ratios: heights divided by widths.
    Returns:
        float32, place by place in rows, the ratios of a place together.

    Example:
        >>> anchors((1, 1), stride=4, side=8, ratios=(1.0,)).tolist()
        [[-2.0, -2.0, 6.0, 6.0]]
    """
    heights = side * np.sqrt(np.asarray(ratios, np.float64))
    widths = side**2 / heights
    around = np.stack([-widths, -heights, widths, heights], axis=1) / 2
    y, x = np.meshgrid(*(np.arange(n) + 0.5 for n in grid), indexing="ij")
    centres = stride * np.stack([x, y, x, y], axis=-1).reshape(-1, 1, 4)
    return (centres + around[None]).reshape(-1, 4).astype(np.float32)
