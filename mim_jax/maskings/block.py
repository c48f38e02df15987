# SPDX-License-Identifier: Apache-2.0
"""Hides random rectangles, which may overlap, until enough patches are hidden."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from mim_jax.maskings.base import Masking, visible_patches
from mim_jax.ops.masking import Mask, cut
from mim_jax.ops.patches import Grid
from mim_jax.schema import check_ranges, within


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

    ratio: float = within(0.4, above=0, below=1)
    least: int = within(16, least=1, most=2**28)
    aspect: float = within(0.3, least=1e-3, most=1)
    rectangles: int = within(32, least=1, most=10**4)

    def __post_init__(self):
        check_ranges(self)

    def visible_count(self, grid: Grid) -> int:
        visible = visible_patches(self.ratio, grid)
        if self.least > grid.size - visible:
            raise ValueError(
                f"least={self.least}: want at most the {grid.size - visible} patches "
                f"that ratio={self.ratio} hides"
            )
        return visible

    def __call__(self, keys: Key[Array, " b"], grid: Grid) -> Mask:
        visible = self.visible_count(grid)
        return cut(jax.vmap(lambda key: self._order(key, grid, visible))(keys), visible)

    def _order(self, key: Key[Array, ""], grid: Grid, visible: int) -> Int[Array, " n"]:
        def uniform(key, least, most):  # a column: one number per rectangle
            # float32 whatever jax_enable_x64 says, so that masks have the same bits.
            shape = (self.rectangles, 1)
            return jax.random.uniform(key, shape, jnp.float32, least, most)

        area_key, aspect_key, row_key, col_key, tie_key = jax.random.split(key, 5)
        area = uniform(area_key, self.least, grid.size - visible)
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
