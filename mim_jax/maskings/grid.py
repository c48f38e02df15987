# SPDX-License-Identifier: Apache-2.0
"""Leaves one patch visible in every cell of a regular grid."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from mim_jax.maskings.base import Masking
from mim_jax.ops.masking import Mask, from_scores
from mim_jax.ops.patches import Grid
from mim_jax.schema import check_ranges, within


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridMasking(Masking):
    """Hides all but one random patch of every cell x cell block: ratio 1 - 1 / cell**2.

    Attributes:
        cell: patches along the side of a cell, >= 2; divides both grid sides.
    """

    cell: int = within(2, least=2, most=2**14)

    def __post_init__(self):
        check_ranges(self)

    def visible_count(self, grid: Grid) -> int:
        if grid.rows % self.cell or grid.cols % self.cell:
            raise ValueError(
                f"cell={self.cell} does not tile a grid of {grid.rows}x{grid.cols} "
                "patches: choose a divisor of both"
            )
        return grid.size // self.cell**2

    def whole_side(self, grid: Grid) -> int:
        return grid.patch

    def __call__(self, keys: Key[Array, " b"], grid: Grid) -> Mask:
        rows, cols, side = grid.rows // self.cell, grid.cols // self.cell, self.cell
        shape, count = (rows, 1, cols, 1), side * side
        choice = jax.vmap(
            # int32 whatever jax_enable_x64 says, so that masks have the same bits.
            lambda key: jax.random.randint(key, shape, 0, count, jnp.int32)
        )(keys)
        inner = jnp.arange(count, dtype=jnp.int32).reshape(1, 1, side, 1, side)
        hidden = (inner != choice).reshape(keys.shape[0], grid.size)
        return from_scores(hidden.astype(jnp.int32), self.visible_count(grid))
