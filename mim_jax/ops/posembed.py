# SPDX-License-Identifier: Apache-2.0
"""Position tables: from one grid to another, and which pairs share a bias."""

import numpy as np
from jaxtyping import Float, Int

from mim_jax.ops.patches import Grid


def relative_pairs(grid: Grid) -> tuple[Int[np.ndarray, "t t"], int]:
    """Which row of a table of relative positions each pair of tokens takes.

    Of a query i and a key j it is (row i - row j + rows - 1) * (2 cols - 1) + col i -
    col j + cols - 1. Three more rows, at the end, are for pairs with the class token,
    which comes first: as query, as key, and with itself. arXiv:2106.08254 has this
    order in its released weights.

    Returns:
        (rows of the table, number of rows).

    Example:
        >>> relative_pairs(Grid(1, 2, 16))[0].tolist()
        [[5, 3, 3], [4, 1, 0], [4, 2, 1]]
    """
    row, col = np.divmod(np.arange(grid.size), grid.cols)
    down = row[:, None] - row[None, :] + grid.rows - 1
    across = col[:, None] - col[None, :] + grid.cols - 1
    wide = 2 * grid.cols - 1
    count = (2 * grid.rows - 1) * wide + 3
    pairs = np.full((1 + grid.size, 1 + grid.size), count - 2, np.int32)
    pairs[0], pairs[0, 0] = count - 3, count - 1
    pairs[1:, 1:] = down * wide + across
    return pairs, count


def resized(
    table: Float[np.ndarray, "n d"], old: tuple[int, int], new: tuple[int, int]
) -> Float[np.ndarray, "m d"]:
    """Resizes a position table to another grid by bicubic interpolation.

    It equals PyTorch's "bicubic", with which MAE's fine-tuning resizes positions: no
    antialiasing, pixel centres aligned, edges repeated, cubic coefficient -0.75.

    Args:
        table: one row per patch of the old grid, in row-major order.
        old, new: rows and columns of the grids.
    Raises:
        ValueError: the table does not have one row per patch of the old grid.
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
    """Weight of each old position at each new one, Keys 1981 with a = -0.75."""
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
