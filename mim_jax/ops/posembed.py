# SPDX-License-Identifier: Apache-2.0
"""Fixed sine-cosine position tables, computed in float64 numpy at trace time."""

import numpy as np
from jaxtyping import Float

from mim_jax.ops.patches import Grid


def sincos_1d(positions: Float[np.ndarray, " n"], width: int) -> np.ndarray:
    """Sines, then cosines, of each position at width / 2 frequencies: [n, width].

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


def resized(
    table: Float[np.ndarray, "n d"], old: tuple[int, int], new: tuple[int, int]
) -> Float[np.ndarray, "m d"]:
    """A position table of one grid for another, by bicubic interpolation.

    Without antialiasing, pixel centres aligned, edges repeated, cubic coefficient
    -0.75: what PyTorch calls bicubic, which MAE's fine-tuning resizes positions by.

    Args:
        old, new: rows and columns.
    Raises:
        ValueError: the table is not one of the old grid.
    """
    rows, cols = old
    if len(table) != rows * cols:
        raise ValueError(
            f"a table of {len(table)} positions for a grid of {rows} x {cols}: want "
            f"{rows * cols}"
        )
    down, across = _bicubic(rows, new[0]), _bicubic(cols, new[1])
    grid = table.reshape(rows, cols, -1).astype(np.float64)
    grid = np.einsum("ia,jb,abd->ijd", down, across, grid)
    return grid.reshape(new[0] * new[1], -1).astype(table.dtype)


def _bicubic(old: int, new: int) -> Float[np.ndarray, "{new} {old}"]:
    """Weights of old places at new ones, Keys 1981 with a = -0.75."""
    a = -0.75
    places = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(places).astype(int)
    weights = np.zeros((new, old))
    for offset in range(-1, 3):
        at = first + offset
        x = np.abs(places - at)
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * (x**3 - 5 * x**2 + 8 * x - 4)
        share = np.where(x <= 1, near, np.where(x < 2, far, 0))
        np.add.at(weights, (np.arange(new), np.clip(at, 0, old - 1)), share)
    return weights
