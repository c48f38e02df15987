# SPDX-License-Identifier: Apache-2.0
"""Weights of hidden pixels by their distance from the visible ones."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mim_jax.ops.masking import Mask, take
from mim_jax.ops.patches import Grid, patchify


def interior(
    mask: Mask, grid: Grid, depth: int, soft: bool
) -> Float[Array, "b m {grid.patch}*{grid.patch}"]:
    """The weights of the pixels of hidden patches, in the order of `mask.drop`.

    The distance of two pixels is the larger of their distances in rows and in columns:
    a pixel that touches a visible one, also at a corner, has distance 1.

    Source: arXiv:2306.04898, section 3.6, which proposes to ignore pixels near the
    boundary. The soft weights are ours.

    Args:
        depth: pixels with at most this distance from a visible pixel are near, >= 1.
        soft: False: near pixels have weight 0, others 1. True: a pixel at distance d
            has weight min(d, depth + 1) / (depth + 1).
    """
    shown = ~mask.hidden.reshape(-1, grid.rows, grid.cols)
    near = shown.repeat(grid.patch, axis=1).repeat(grid.patch, axis=2)
    near = near.astype(jnp.float32)
    nearness = jnp.zeros_like(near)  # how many of the distances 1 to depth reach it
    for _ in range(depth):
        window = (1, 3, 3), (1, 1, 1)
        near = jax.lax.reduce_window(near, 0.0, jax.lax.max, *window, "SAME")
        nearness += near
    weights = 1 - (nearness / (depth + 1) if soft else near)
    return take(patchify(weights[..., None], grid.patch), mask.drop)


def interior_errors(
    prediction: Float[Array, "b m p"],
    target: Float[Array, "b m p"],
    weights: Float[Array, "b m q"],
) -> tuple[Float[Array, "b m"], Float[Array, "b m"]]:
    """Squared errors of each patch, weighted by pixel, and the sums of these weights.

    Their quotient is the weighted mean of the squared error over the pixels, where the
    error of a pixel is the mean over its channels.

    Args:
        weights: one for each pixel; p is q times the number of channels.
    """
    error = prediction.astype(target.dtype) - target
    by_pixel = jnp.mean((error * error).reshape(*weights.shape, -1), axis=-1)
    weights = weights.astype(target.dtype)
    return (weights * by_pixel).sum(axis=-1), weights.sum(axis=-1)
