# SPDX-License-Identifier: Apache-2.0
"""Hides all patches below random latents of a hierarchy that the example states."""

import dataclasses

from jaxtyping import Array, Int, Key

from mim_jax.maskings.base import Masking, visible_patches
from mim_jax.ops.masking import Mask, from_groups
from mim_jax.ops.patches import Grid
from mim_jax.schema import check_ranges, within


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subtrees(Masking):
    """Masks aligned with the latent structure, which arXiv:2306.04898, section 3.6,
    proposes: what is hidden is hidden with all that belongs to the same latent.

    The example has the field `tree`, as source `hierarchy` has: integers (levels, rows,
    columns), for each patch the number of the latent above it at level 1, 2, ...; all
    numbers are below the number of patches. For real images the examples `regions` make
    such a tree of what looks alike: `--config=configs/mae.py:mnist,examples=regions`.

    Attributes:
        ratio: share of patches that is hidden, 0 < ratio < 1. Of the last latent only
            a random part is hidden where the ratio wants it.
        level: of the latents, whose patches are hidden together; 1 is the lowest.
    """

    reads = ("tree",)

    ratio: float = within(0.75, above=0, below=1)
    level: int = within(1, least=1, most=64)

    def __post_init__(self):
        check_ranges(self)

    def visible_count(self, grid: Grid) -> int:
        return visible_patches(self.ratio, grid)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        keys: Key[Array, " b"],
        grid: Grid,
        *,
        tree: Int[Array, "b levels rows cols"],
    ) -> Mask:
        levels, rows, cols = tree.shape[1:]
        if (rows, cols) != (grid.rows, grid.cols):
            raise ValueError(
                f"the example's tree is over {rows}x{cols} patches, and the encoder's "
                f"grid is {grid.rows}x{grid.cols}: want an encoder.patch that fits"
            )
        if self.level > levels:
            raise ValueError(
                f"level={self.level} of a tree of {levels} levels: want one of them"
            )
        latent = tree[:, self.level - 1].reshape(-1, grid.size)
        return from_groups(latent, keys, self.visible_count(grid))
