# SPDX-License-Identifier: Apache-2.0
"""The second mask of an image, T2 of arXiv:2208.04164, which R-MAE and C-MAE share."""

from collections.abc import Mapping

from jaxtyping import Array, Key

from mim_jax.maskings.base import Masking
from mim_jax.objectives.base import purpose
from mim_jax.ops.masking import Mask, complement, masks_of, no_mask
from mim_jax.ops.patches import Grid


def second_mask(
    t2: str,
    masking: Masking,
    first: Mask,
    batch: Mapping,
    keys: Key[Array, " b"],
    grid: Grid,
) -> Mask:
    """The mask of T2 of arXiv:2208.04164, given that of T1.

    Args:
        t2: "complement": T2 hides what T1 shows; "identity": nothing; "independent":
            what `masking` draws, by other keys than those of T1. Where T1 hides
            nothing, T2 hides nothing either: its complement would show nothing.
        masking: of "independent"; it may read fields of the batch, but has no memory.
        first: the mask of T1.
        batch, keys, grid: as for `masks_of`.
    """
    if t2 == "identity" or not first.drop.shape[1]:
        return no_mask(keys.shape[0], grid)
    if t2 == "complement":
        return complement(first)
    drawn = {name: batch[name] for name in masking.reads}
    return masks_of(masking, drawn, purpose(keys, 3), grid)


def second_visible_count(t2: str, masking: Masking, visible: int, grid: Grid) -> int:
    """Number of patches that T2 shows where T1 shows `visible`; as `second_mask`."""
    if t2 == "identity" or visible == grid.size:
        return grid.size
    if t2 == "complement":
        return grid.size - visible
    return masking.visible_count(grid)
