# SPDX-License-Identifier: Apache-2.0
"""Resizes position tables from one grid to another."""

import numpy as np
from jaxtyping import Float


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
