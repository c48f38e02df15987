# SPDX-License-Identifier: Apache-2.0
"""Images as grids of patches, and the pixel target of masked autoencoding."""

from typing import NamedTuple

import einops
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped


class Grid(NamedTuple):
    """An image cut into rows x cols square patches of `patch` pixels a side."""

    rows: int
    cols: int
    patch: int

    @property
    def size(self) -> int:
        """Number of patches; position i is row i // cols, column i % cols."""
        return self.rows * self.cols


def grid_of(height: int, width: int, patch: int) -> Grid:
    """The patch grid of an image of height x width pixels.

    Raises:
        ValueError: a side is not a positive multiple of the patch.
    """
    if patch < 1 or height < patch or width < patch or height % patch or width % patch:
        raise ValueError(
            f"image {height}x{width} with patch={patch}: want both sides to be "
            f"multiples of the patch, e.g. {_nearest(height, patch)}x"
            f"{_nearest(width, patch)}"
        )
    return Grid(height // patch, width // patch, patch)


def patchify(
    images: Shaped[Array, "b h w c"], patch: int
) -> Shaped[Array, "b (h//{patch})*(w//{patch}) {patch}*{patch}*c"]:
    """Row-major patches; a patch vector is ordered row, column, channel (last)."""
    return einops.rearrange(
        images, "b (h p) (w q) c -> b (h w) (p q c)", p=patch, q=patch
    )


def unpatchify(patches: Shaped[Array, "b n p"], grid: Grid) -> Shaped[Array, "b h w c"]:
    """The image of which `patches` are the patches: inverse of `patchify`."""
    return einops.rearrange(
        patches,
        "b (h w) (p q c) -> b (h p) (w q) c",
        h=grid.rows,
        w=grid.cols,
        p=grid.patch,
        q=grid.patch,
    )


def patch_statistics(
    patches: Float[Array, "b n p"],
) -> tuple[Float[Array, "b n 1"], Float[Array, "b n 1"]]:
    """Mean and standard deviation of each patch vector, all channels together.

    The variance has divisor p - 1 (the reference MAE's, unlike numpy's default) and
    1e-6 is added to it before the root, so a flat patch has deviation 1e-3.
    """
    mean = patches.mean(axis=-1, keepdims=True)
    variance = patches.var(axis=-1, keepdims=True, ddof=1)
    return mean, jnp.sqrt(variance + 1e-6)


def normalise_patches(patches: Float[Array, "b n p"]) -> Float[Array, "b n p"]:
    """Each patch with its own mean removed, divided by its own deviation.

    Source: arXiv:2111.06377, section 3, "reconstruction target".
    """
    mean, deviation = patch_statistics(patches)
    return (patches - mean) / deviation


def _nearest(side: int, patch: int) -> int:
    return max(1, round(side / max(patch, 1))) * max(patch, 1)
