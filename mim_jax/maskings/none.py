# SPDX-License-Identifier: Apache-2.0
"""No masking: the encoder sees the whole image."""

import dataclasses

from jaxtyping import Array, Key

from mim_jax.maskings.base import Masking
from mim_jax.ops.masking import Mask, no_mask
from mim_jax.ops.patches import Grid


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nothing(Masking):
    """Hides nothing, as in the rows without masking of arXiv:2208.04164, table 5."""

    @property
    def distinct(self) -> int:
        return 1

    def visible_count(self, grid: Grid) -> int:
        return grid.size

    def __call__(self, keys: Key[Array, " b"], grid: Grid) -> Mask:
        return no_mask(keys.shape[0], grid)
