# SPDX-License-Identifier: Apache-2.0
"""Hides random rectangles, which may overlap, until enough patches are hidden."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from mim_jax.maskings.base import Masking
from mim_jax.ops.masking import Mask, cut
from mim_jax.ops.patches import Grid


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block(Masking):
    """Hides rectangles of patches, after BEiT (arXiv:2106.08254, algorithm 1).

    Departure from the paper: the number of hidden patches is the same for every image.
    Of the last rectangle only a random part is hidden; the paper shrinks or drops it.

    Attributes:
        ratio: share of patches that is hidden, 0 < ratio < 1.
        least: area of the smallest rectangle in patches.
        aspect: height / width is log-uniform in (aspect, 1 / aspect), 0 < aspect <= 1.
        rectangles: number of rectangles drawn per image. If all of them cover less than
            the ratio, further patches are hidden at random.
    """

    ratio: float = 0.4
    least: int = 16
    aspect: float = 0.3
    rectangles: int = 32

    def __post_init__(self):
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio={self.ratio}: want 0 < ratio < 1")
        if self.least < 1 or self.rectangles < 1 or not 0 < self.aspect <= 1:
            raise ValueError(
                f"least={self.least}, rectangles={self.rectangles}, "
                f"aspect={self.aspect}: want at least 1, at least 1, and in (0, 1]"
            )

    def visible_count(self, grid: Grid) -> int:
        kept = int(grid.size * (1 - self.ratio) + 1e-6)
        if not 0 < kept < grid.size:
            raise ValueError(
                f"ratio={self.ratio} leaves {kept} of {grid.size} patches visible: "
                "want at least one visible and one hidden"
            )
        if self.least > grid.size - kept:
            raise ValueError(
                f"least={self.least}: want at most the {grid.size - kept} patches that "
                f"ratio={self.ratio} hides"
            )
        return kept

    def __call__(self, keys: Key[Array, " b"], grid: Grid) -> Mask:
        kept = self.visible_count(grid)
        return cut(jax.vmap(lambda key: self._order(key, grid, kept))(keys), kept)

    def _order(self, key: Key[Array, ""], grid: Grid, kept: int) -> Int[Array, " n"]:
        def uniform(key, least, most):  # a column: one number per rectangle
            # float32 whatever jax_enable_x64 says, so that masks have the same bits.
            shape = (self.rectangles, 1)
            return jax.random.uniform(key, shape, jnp.float32, least, most)

        area_key, aspect_key, row_key, col_key, tie_key = jax.random.split(key, 5)
        area = uniform(area_key, self.least, grid.size - kept)
        bound = -math.log(self.aspect)
        ratio = jnp.exp(uniform(aspect_key, -bound, bound))
        height = jnp.clip(jnp.round(jnp.sqrt(area * ratio)), 1, grid.rows)
        width = jnp.clip(jnp.round(jnp.sqrt(area / ratio)), 1, grid.cols)
        top = jnp.floor(uniform(row_key, 0, 1) * (grid.rows - height + 1))
        left = jnp.floor(uniform(col_key, 0, 1) * (grid.cols - width + 1))
        place = jnp.arange(grid.size, dtype=jnp.int32)[None, :]
        row, col = jnp.divmod(place, grid.cols)
        row, col = row.astype(jnp.float32), col.astype(jnp.float32)
        covers = (row >= top) & (row < top + height)
        covers &= (col >= left) & (col < left + width)
        first = jnp.where(covers.any(axis=0), covers.argmax(axis=0), self.rectangles)
        # The visible patches are the first of this order: uncovered patches come first,
        # then those of the last rectangle, the one before it, and so on.
        noise = jax.random.bits(tie_key, (grid.size,), "uint32")
        return jnp.lexsort((noise, -first)).astype(jnp.int32)
