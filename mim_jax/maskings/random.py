# SPDX-License-Identifier: Apache-2.0
"""Uniform random masking of square units, which may be larger than a ViT patch."""

import dataclasses
from typing import Literal

import jax
from jaxtyping import Array, Key

from mim_jax.maskings.base import Masking
from mim_jax.ops.masking import Mask, cut, order_units
from mim_jax.ops.patches import Grid
from mim_jax.schema import check_ranges, within


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random(Masking):
    """Hides a fixed share of the units of every image, uniformly at random.

    MAE's units are single patches (arXiv:2111.06377). Units larger than a patch are the
    mask sizes of arXiv:2306.04898, section 3.

    Attributes:
        ratio: share of units that is hidden, 0 < ratio < 1. The number of visible units
            is floor(units * (1 - ratio) + 1e-6).
        unit: side of a unit in PIXELS, a multiple of the ViT patch; None: one patch.
        partial_units: "round" hides whole units only; they have to tile the image.
            "allow" counts patches instead of units, so that one unit may be hidden in
            part and units may reach over the image's border, as in long-sequence MAE
            (arXiv:2210.07224).
    """

    ratio: float = within(0.75, above=0, below=1)
    unit: int | None = within(None, least=1, most=2**14)
    partial_units: Literal["round", "allow"] = "round"

    def __post_init__(self):
        check_ranges(self)

    def visible_count(self, grid: Grid) -> int:
        side, total = self._side(grid), grid.size
        if side >= max(grid.rows, grid.cols):
            raise ValueError(
                f"unit={side * grid.patch} pixels covers an image of {_size(grid)}, so "
                "that every mask would be the same: want a smaller one"
            )
        per_unit, word = 1, "patches"
        if self.partial_units == "round":
            if grid.rows % side or grid.cols % side:
                raise ValueError(
                    f"unit={self.unit} pixels does not tile an image of {_size(grid)}: "
                    "choose a divisor of both sides, or partial_units='allow'"
                )
            per_unit, word = side * side, "units"
            total = grid.size // per_unit
        visible = self._visible(total)
        if not 0 < visible < total:
            raise ValueError(
                f"ratio={self.ratio} leaves {visible} of {total} {word} visible: want "
                "at least one visible and one hidden, "
                f"1 <= {total} * (1 - ratio) < {total}"
            )
        return visible * per_unit

    def whole_side(self, grid: Grid) -> int:
        return (
            self._side(grid) * grid.patch
            if self.partial_units == "round"
            else grid.patch
        )

    def __call__(self, keys: Key[Array, " b"], grid: Grid) -> Mask:
        side = self._side(grid)
        units = -(-grid.rows // side) * -(-grid.cols // side)
        # 32 random bits: float32 noise has 2**23 values and ties favour low positions.
        scores = jax.vmap(lambda key: jax.random.bits(key, (units,), "uint32"))(keys)
        if self.partial_units == "round":
            visible = self._visible(units) * side * side
        else:
            visible = self._visible(grid.size)
        return cut(order_units(scores, grid, side), visible)

    def _visible(self, total: int) -> int:
        return int(total * (1 - self.ratio) + 1e-6)  # int(10 * (1 - .9)) is 0

    def _side(self, grid: Grid) -> int:
        """Patches along the side of a unit."""
        unit = grid.patch if self.unit is None else self.unit
        if unit % grid.patch:
            raise ValueError(
                f"unit={unit} pixels with a ViT patch of {grid.patch}: want a multiple "
                f"of the patch, e.g. {max(1, unit // grid.patch) * grid.patch}"
            )
        return unit // grid.patch


def _size(grid: Grid) -> str:
    return f"{grid.rows * grid.patch}x{grid.cols * grid.patch}"
