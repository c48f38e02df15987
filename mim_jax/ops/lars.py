# SPDX-License-Identifier: Apache-2.0
"""The trust ratio of LARS."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float


def trusted(
    gradient: Float[Array, "..."],
    parameter: Float[Array, "..."],
    coefficient: float,
    axes: Sequence[int] | None = None,
) -> Float[Array, "..."]:
    """The gradient scaled to the length coefficient * |parameter|.

    If gradient or parameter is all zeros, the gradient is returned unchanged.

    Args:
        axes: axes over which lengths are computed; None: all.
    Source: arXiv:1708.03888, Eq. (6).
    """
    axes = tuple(range(gradient.ndim)) if axes is None else tuple(axes)
    steep, long = (
        jnp.sqrt(jnp.sum(x**2, axis=axes, keepdims=True)) for x in (gradient, parameter)
    )
    safe = jnp.where(steep > 0, steep, 1)
    return gradient * jnp.where((steep > 0) & (long > 0), coefficient * long / safe, 1)
