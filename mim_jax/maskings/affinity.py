# SPDX-License-Identifier: Apache-2.0
"""Hides groups of positions whose tokens the encoder relates to each other."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from mim_jax.maskings.base import Masking, visible_patches
from mim_jax.ops.masking import Mask, from_groups
from mim_jax.ops.patches import Grid, to_float
from mim_jax.schema import check_ranges, within


@dataclasses.dataclass(frozen=True, kw_only=True)
class Affinity(Masking):
    """Masks guided by what the encoder has learned so far, which arXiv:2306.04898,
    section 3.6, proposes.

    The affinity of two positions is the cosine, over a batch of whole images, of how
    their tokens differ from their means: 1 if they always change together, 0 if they
    are not related. It is one matrix for all images, so it finds structure that stays
    where it is, such as the squares of source `hierarchy` without `shift`.

    A mask draws `groups` positions at random. Every patch joins the one to which it has
    the greatest affinity, and whole groups are hidden. Before the first refresh nothing
    is known: groups and masks are random.

    Attributes:
        ratio: share of patches that is hidden, 0 < ratio < 1. Of the last group only a
            random part is hidden where the ratio wants it.
        groups: number of groups; at most the number of patches.
        decay: share of the old affinity that a refresh keeps.
        refresh_every: steps between refreshes; each costs one pass of the encoder over
            the whole images of a batch.
    """

    ratio: float = within(0.75, above=0, below=1)
    groups: int = within(8, least=2, most=2**14)
    decay: float = within(0.5, least=0, below=1)
    refresh_every: int = within(50, least=1, most=2**31 - 1)

    def __post_init__(self):
        check_ranges(self)

    def visible_count(self, grid: Grid) -> int:
        if self.groups > grid.size:
            raise ValueError(
                f"groups={self.groups} of {grid.size} patches: want at most as many"
            )
        return visible_patches(self.ratio, grid)

    def first_memory(self, grid: Grid) -> Float[Array, "n n"]:
        return jnp.zeros((grid.size, grid.size), jnp.float32)

    def refresh(
        self, memory: Any, objective: Any, params: Any, batch: dict[str, Any], keys
    ) -> Float[Array, "n n"]:
        del keys
        tokens, _ = objective.encode(params, to_float(batch["image"]))
        tokens = tokens[:, -len(memory) :].astype(jnp.float32)  # no class token
        apart = tokens - tokens.mean(axis=0, keepdims=True)
        products = jnp.einsum("bnd,bmd->nm", apart, apart)
        length = jnp.sqrt(jnp.maximum(jnp.diagonal(products), 1e-12))
        new = products / (length[:, None] * length[None, :])
        return self.decay * memory + (1 - self.decay) * new

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, keys: Key[Array, " b"], grid: Grid, *, memory: Float[Array, "n n"]
    ) -> Mask:
        def grouped(key):
            centre_key, tie_key = jax.random.split(key)
            place = jax.random.permutation(centre_key, grid.size)
            ties = jax.random.uniform(tie_key, (grid.size, grid.size), jnp.float32)
            near = jnp.where(place[None] < self.groups, memory + 1e-4 * ties, -jnp.inf)
            return jnp.argmax(near, axis=1)  # the position of its centre

        # Far from the numbers of splits, which are those of fold_in too.
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, 2000)
        group = jax.vmap(grouped)(own)
        return from_groups(group.astype(jnp.int32), keys, self.visible_count(grid))
