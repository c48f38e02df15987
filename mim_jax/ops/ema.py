# SPDX-License-Identifier: Apache-2.0
"""A teacher that follows the student as an exponential moving average."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mim_jax.schema import check_ranges, within


@dataclasses.dataclass(frozen=True, kw_only=True)
class EMA:
    """Momentum of a teacher, arXiv:2208.04164, sections 3 and 5.

    Attributes:
        base: momentum, 0 <= base <= 1; with "cosine" that of the first update.
        schedule: "constant", or "cosine": the momentum rises to 1 at the end of the
            run, as in BYOL (arXiv:2006.07733) and MoCo v3. The update after s of S
            steps has the momentum 1 - (1 - base) (1 + cos(pi s / S)) / 2.
    """

    base: float = within(0.996, least=0, most=1)
    schedule: Literal["constant", "cosine"] = "constant"

    def __post_init__(self):
        check_ranges(self)

    def share(self, done: Array | int, total: int) -> Float[Array, ""]:
        """1 - momentum of the update that follows `done` of `total` steps."""
        share = jnp.asarray(1 - self.base, jnp.float32)
        if self.schedule == "cosine":
            progress = jnp.asarray(done, jnp.float32) / total
            share = share * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return share

    def update(self, old: Any | None, new: Any, done: Array | int, total: int) -> Any:
        """The next teacher: momentum * old + (1 - momentum) * new.

        Args:
            old: the teacher, a tree like `new`; None: the first teacher is `new`.
            new: the student's parameters after `done` steps of `total`.
        """
        if old is None:
            return new
        share = self.share(done, total)
        return jax.tree.map(lambda a, b: a + share.astype(a.dtype) * (b - a), old, new)
