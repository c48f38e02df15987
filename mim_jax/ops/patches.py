# SPDX-License-Identifier: Apache-2.0
"""Images as grids of patches: standardising, cutting, position tables, patch errors."""

from collections.abc import Sequence
from typing import NamedTuple

import einops
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped, UInt8

Channels = Sequence[float]  # a number for each channel of an image


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


def to_float(
    images: UInt8[Array, "b h w c"] | Float[Array, "b h w c"],
) -> Float[Array, "b h w c"]:
    """uint8 images as float32 in 0..1; float images, in 0..1 already, are unchanged.

    Raises:
        TypeError: images of another type, such as int32.
    """
    if images.dtype != jnp.uint8:
        return _floating(images)
    return images.astype(jnp.float32) / 255


def _floating(images: Array) -> Float[Array, "b h w c"]:
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(
            f"images are {images.dtype}: want uint8 in 0..255, or floats in 0..1"
        )
    return images


def normalise(
    images: Float[Array, "b h w c"], mean: Channels, std: Channels
) -> Float[Array, "b h w c"]:
    """Standardises images in 0..1 by one mean and one std per channel.

    Raises:
        TypeError: the images are integers; `to_float` makes uint8 images floats.
    """
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(f"images are {images.dtype}: want floats in 0..1, see to_float")
    centre, scale = (
        jnp.asarray(x, images.dtype)[None, None, None] for x in (mean, std)
    )
    return (images - centre) / scale


def denormalise(
    images: Float[Array, "b h w c"], mean: Channels, std: Channels
) -> Float[Array, "b h w c"]:
    """Inverse of `normalise`: images in 0..1 (not clipped)."""
    centre, scale = (
        jnp.asarray(x, images.dtype)[None, None, None] for x in (mean, std)
    )
    return images * scale + centre


def standard_patches(
    images: Float[Array, "b h w c"], patch: int, mean: Channels, std: Channels
) -> tuple[Float[Array, "b n p"], Grid]:
    """Standardised patches of images in 0..1, and the grid where they sit."""
    grid = grid_of(images.shape[1], images.shape[2], patch)
    return patchify(normalise(images, mean, std), patch), grid


def patchify(
    images: Shaped[Array, "b h w c"], patch: int
) -> Shaped[Array, "b (h//{patch})*(w//{patch}) {patch}*{patch}*c"]:
    """Row-major patches; a patch vector is ordered row, column, channel (last)."""
    return einops.rearrange(
        images, "b (h p) (w q) c -> b (h w) (p q c)", p=patch, q=patch
    )


def unpatchify(patches: Shaped[Array, "b n p"], grid: Grid) -> Shaped[Array, "b h w c"]:
    """Puts patches together to images: inverse of `patchify`."""
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
    """Mean and standard deviation of each patch vector, over all channels together.

    The variance has divisor p - 1, as in the reference MAE and unlike numpy's default.
    1e-6 is added to it before the root, so that a flat patch has deviation 1e-3.
    """
    mean = patches.mean(axis=-1, keepdims=True)
    variance = patches.var(axis=-1, keepdims=True, ddof=1)
    return mean, jnp.sqrt(variance + 1e-6)


def normalise_patches(patches: Float[Array, "b n p"]) -> Float[Array, "b n p"]:
    """Subtracts from each patch its own mean and divides by its own deviation.

    Source: arXiv:2111.06377, section 3, "reconstruction target".
    """
    mean, deviation = patch_statistics(patches)
    return (patches - mean) / deviation


def patch_mse(
    prediction: Float[Array, "b n p"], target: Float[Array, "b n p"]
) -> Float[Array, "b n"]:
    """Mean squared error of each patch vector.

    It is computed in the target's dtype (float32 or wider), whatever the dtype of the
    prediction.
    """
    error = prediction.astype(target.dtype) - target
    return jnp.mean(error * error, axis=-1)


def sincos_1d(positions: Float[np.ndarray, " n"], width: int) -> np.ndarray:
    """Sines, then cosines, of each position times width / 2 frequencies: [n, width].

    Frequency i is 10000 ** (-i / (width / 2)), arXiv:1706.03762.
    """
    frequencies = 10000.0 ** (-np.arange(width // 2, dtype=np.float64) / (width // 2))
    angles = positions[:, None].astype(np.float64) * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def sincos_2d(grid: Grid, width: int) -> Float[np.ndarray, "n d"]:
    """Position table of a grid, float64, one row per patch in row-major order.

    The first half of the channels encodes the COLUMN, the second half the row, as in
    the released MAE models (MoCo v3 has the halves the other way round).

    Raises:
        ValueError: width is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"width={width}: want a multiple of 4 for sine-cosine tables")
    rows, cols = np.divmod(np.arange(grid.size, dtype=np.float64), grid.cols)
    half = width // 2
    return np.concatenate([sincos_1d(cols, half), sincos_1d(rows, half)], axis=1)


def _nearest(side: int, patch: int) -> int:
    return max(1, round(side / max(patch, 1))) * max(patch, 1)
