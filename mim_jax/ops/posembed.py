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
