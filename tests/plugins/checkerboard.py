# SPDX-License-Identifier: Apache-2.0
"""A masking that reads nothing but keys, and has two different masks.

PYTHONPATH=tests/plugins python -m mim_jax.main --plugins=checkerboard \
    --config=configs/mae.py:digits,masking=checkerboard --workdir=runs/checkerboard
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax import config
from mim_jax.maskings.base import Masking
from mim_jax.ops.masking import from_scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkerboard(Masking):
    """Hides the black or the white squares of a checkerboard, each for half of images.

    Attributes:
        cell: side of a square in patches, >= 1; divides both grid sides.
    """

    cell: int = 1

    def __post_init__(self):
        if self.cell < 1:
            raise ValueError(f"cell={self.cell}: want at least 1 patch")

    @property
    def distinct(self):
        return 2

    def visible_count(self, grid):
        rows, cols = grid.rows / self.cell, grid.cols / self.cell
        if rows % 1 or cols % 1 or rows * cols % 2:
            raise ValueError(
                f"cell={self.cell} on a grid of {grid.rows}x{grid.cols} patches: want "
                "a divisor of both sides that makes an even number of squares"
            )
        return grid.size // 2

    def __call__(self, keys, grid):
        rows, cols = np.divmod(np.arange(grid.size), grid.cols)
        black = jnp.asarray((rows // self.cell + cols // self.cell) % 2, jnp.uint32)
        # Bits, and no float: they are the same whatever jax_enable_x64 says.
        phase = jax.vmap(lambda key: jax.random.bits(key, (), "uint32") % 2)(keys)
        hidden = black[None, :] == phase[:, None]
        return from_scores(hidden.astype(jnp.int32), self.visible_count(grid))


config.register("checkerboard", Checkerboard)
