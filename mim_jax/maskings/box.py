# SPDX-License-Identifier: Apache-2.0
"""Hides the same rectangle of every image."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Key

from mim_jax.maskings.base import Masking
from mim_jax.ops.masking import Mask, from_scores
from mim_jax.ops.patches import Grid
from mim_jax.schema import check_ranges, within


@dataclasses.dataclass(frozen=True, kw_only=True)
class Box(Masking):
    """One mask for all images: Theorem 2 of arXiv:2306.04898 is about one mask.

    Attributes:
        top, left: first hidden row and column of patches, from 0.
        rows, cols: hidden rows and columns of patches.
    """

    top: int = within(0, least=0, most=2**14)
    left: int = within(0, least=0, most=2**14)
    rows: int = within(1, least=1, most=2**14)
    cols: int = within(1, least=1, most=2**14)

    def __post_init__(self):
        check_ranges(self)

    @property
    def distinct(self) -> int:
        return 1

    def visible_count(self, grid: Grid) -> int:
        bottom, right = self.top + self.rows, self.left + self.cols
        if bottom > grid.rows or right > grid.cols:
            raise ValueError(
                f"the box ends at row {bottom} and column {right} of {grid.rows} x "
                f"{grid.cols} patches: want top + rows and left + cols within them"
            )
        visible = grid.size - self.rows * self.cols
        if not visible:
            raise ValueError("the box hides all patches: want fewer rows or cols")
        return visible

    def __call__(self, keys: Key[Array, " b"], grid: Grid) -> Mask:
        place = jnp.arange(grid.size, dtype=jnp.int32)
        row, col = place // grid.cols - self.top, place % grid.cols - self.left
        inside = (row >= 0) & (row < self.rows) & (col >= 0) & (col < self.cols)
        scores = jnp.broadcast_to(
            inside.astype(jnp.int32)[None], (len(keys), grid.size)
        )
        return from_scores(scores, self.visible_count(grid))
