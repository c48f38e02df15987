# SPDX-License-Identifier: Apache-2.0
"""Which patches the encoder sees, as indices; the functions are pure.

No array here is called "mask", since papers disagree on what 1 means. `hidden` is True
at patches that the encoder does not see. `keep` and `drop` are each image's own indices
of visible and of hidden patches.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key, Real, Shaped

from mim_jax.ops.patches import Grid


class Mask(NamedTuple):
    """A partition of the patches of each image into visible and hidden ones.

    Attributes:
        keep: indices of the visible patches, "b k".
        drop: indices of the hidden patches, "b n-k". Every image has the same counts,
            so that shapes are static. The order of indices in a row is arbitrary.
    """

    keep: Int[Array, "b k"]
    drop: Int[Array, "b m"]

    @property
    def hidden(self) -> Bool[Array, "b n"]:
        """True at hidden patches, in grid order."""
        count = self.keep.shape[1] + self.drop.shape[1]
        positions = jnp.arange(count, dtype=self.drop.dtype)
        return (self.drop[:, :, None] == positions[None, None]).any(axis=1)


def masks_of(
    masking: Any, batch: Mapping, keys: Key[Array, " b"], grid: Grid, state: Any = None
) -> Mask:
    """The masks of a batch: its field "mask" if it has one, else drawn by `masking`.

    Args:
        masking: a `mim_jax.maskings.base.Masking`; it gets the fields of the batch that
            it reads, and its memory if it has one.
        batch: fields by name.
        keys: one per image.
        grid: the patches of the images.
        state: a TrainState, or the Run of an evaluation, that has the masking's
            `memory`; may be None for a masking without memory.
    """
    if "mask" in batch:
        return batch["mask"]
    given = {name: batch[name] for name in masking.reads}
    if masking.refresh_every:
        given["memory"] = state.memory
    return masking(keys, grid, **given)


def cut(order: Int[Array, "b n"], keep: int) -> Mask:
    """The mask that shows the first `keep` patches of each row and hides the rest.

    Raises:
        ValueError: keep leaves nothing visible or nothing hidden.
    """
    if not 0 < keep < order.shape[1]:
        raise ValueError(
            f"keep={keep} of {order.shape[1]} patches: want 0 < keep < "
            f"{order.shape[1]}, at least one visible and one hidden"
        )
    return Mask(keep=order[:, :keep], drop=order[:, keep:])


def from_scores(scores: Real[Array, "b n"], keep: int) -> Mask:
    """The mask that shows the `keep` patches with the lowest scores.

    Source: with noise as scores this is the "random sampling without replacement" of
    arXiv:2111.06377, section 3. The mask depends on the noise alone, so that noise
    drawn elsewhere reproduces its mask.
    """
    return cut(_argsort(scores), keep)


def from_groups(group: Int[Array, "b n"], keys: Key[Array, " b"], keep: int) -> Mask:
    """The mask that shows whole groups of patches, drawn at random, and hides the rest.

    Of the one group in which the count `keep` is reached, a random part is shown.

    Args:
        group: number of each patch's group, 0 <= group < n.
        keys: one per image.
        keep: number of visible patches.
    """

    def bits(key):  # of the groups, and of their patches
        return jax.random.bits(key, (2, group.shape[1]), "uint32")

    drawn = jax.vmap(bits)(keys)
    score = jnp.take_along_axis(drawn[:, 0], group, axis=1)
    # Equal bits of two groups must not mix their patches.
    order = jnp.lexsort((drawn[:, 1], group.astype(jnp.int32), score), axis=1)
    return cut(order.astype(jnp.int32), keep)


def from_hidden(hidden: Bool[np.ndarray, "b n"]) -> Mask:
    """The mask that hides exactly the patches where `hidden` is True.

    It runs on the host: `hidden` is a concrete array, not a traced one.

    Raises:
        ValueError: rows hide different numbers of patches, or hide none or all.
    """
    hidden = np.asarray(hidden, dtype=bool)
    counts = hidden.sum(axis=1)
    if counts.min() != counts.max() or not 0 < counts[0] < hidden.shape[1]:
        raise ValueError(
            f"hidden patches per image range from {counts.min()} to {counts.max()} of "
            f"{hidden.shape[1]}: want one count for all images, more than 0 and less "
            "than all of them (shapes must be static)"
        )
    return cut(_argsort(jnp.asarray(hidden)), hidden.shape[1] - int(counts[0]))


def no_mask(rows: int, grid: Grid) -> Mask:
    """The mask that hides nothing; its `keep` is in grid order."""
    keep = jnp.broadcast_to(jnp.arange(grid.size, dtype=jnp.int32), (rows, grid.size))
    return Mask(keep=keep, drop=keep[:, :0])


def complement(mask: Mask) -> Mask:
    """The mask that hides what `mask` shows: 1 - M of arXiv:2208.04164, Eq. (6)."""
    return Mask(keep=mask.drop, drop=mask.keep)


def order_units(
    scores: Real[Array, "b u"], grid: Grid, side: int
) -> Int[Array, "b {grid.size}"]:
    """All patches in an order that sorts units by score and keeps each unit together.

    Units are squares of side x side patches, numbered row-major from the top left. The
    units of the last row and column may reach over the image's border.

    Args:
        scores: one number per unit; units with the lowest scores come first.
        grid: the patches of the images.
        side: patches along the side of a unit, >= 1.
    """
    # Units are sorted before they are expanded to patches: a tie never splits a unit.
    order = _argsort(scores)
    return order if side == 1 else _expanded(order, grid, side)


def _expanded(
    order: Int[Array, "b u"], grid: Grid, side: int
) -> Int[Array, "b {grid.size}"]:
    """Replaces each unit of an order by its patches."""
    unit_cols = -(-grid.cols // side)
    inner = jnp.arange(side * side, dtype=order.dtype)[None, None, :]
    # Inside a unit, patches are in column-major order. With partial units the cut
    # between visible and hidden then splits a unit as long-sequence MAE does,
    # arXiv:2210.07224.
    row = (order // unit_cols * side)[:, :, None] + inner % side
    col = (order % unit_cols * side)[:, :, None] + inner // side
    patches = (row * grid.cols + col).reshape(order.shape[0], -1)
    if grid.rows % side or grid.cols % side:
        outside = (row >= grid.rows) | (col >= grid.cols)
        inside_first = _argsort(outside.reshape(patches.shape))
        patches = jnp.take_along_axis(patches, inside_first, axis=1)
    return patches[:, : grid.size]


def take(
    values: Shaped[Array, "b n d"], index: Int[Array, "b k"]
) -> Shaped[Array, "b k d"]:
    """The rows of `values` at each image's own indices."""
    return jnp.take_along_axis(values, index[:, :, None], axis=1)


def unshuffle(values: Shaped[Array, "b n d"], mask: Mask) -> Shaped[Array, "b n d"]:
    """Sorts patches from the order (`mask.keep`, `mask.drop`) back to grid order."""
    return take(values, _argsort(jnp.concatenate([mask.keep, mask.drop], axis=1)))


def _argsort(values: Shaped[Array, "b n"]) -> Int[Array, "b n"]:
    order = jnp.argsort(values, axis=1, stable=True)
    # int32 whatever jax_enable_x64 says, so that masks have the same bits.
    return jax.lax.convert_element_type(order, jnp.int32)
