# SPDX-License-Identifier: Apache-2.0
"""Softmax attention in plain JAX; `mim_jax/kernels` has a form for each platform."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def attention(
    qkv: Float[Array, "b n e"], bias: Float[Array, " e"], heads: int, offset: Any = None
) -> tuple[Float[Array, "b n e//3"], Float[Array, "b {heads} n n"]]:
    """softmax(q k^T / sqrt(c)) v for each head of width c, and the softmax weights.

    Args:
        qkv: queries, keys and values concatenated along the last axis; each of the
            three is the concatenation of its heads.
        bias: added to `qkv`; of any floating dtype, in which its gradient is summed.
        heads: number of heads.
        offset: "b a n n" or "1 a n n", added to the logits; None: nothing is.
    Returns:
        The attention's output with concatenated heads, and the softmax weights, which
        are float32 at least.
    Source: arXiv:1706.03762, Eq. (1).
    """
    rows, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    parts = (qkv + repeated(bias, qkv)).reshape(rows, tokens, 3, heads, width // heads)
    q, k, v = jnp.moveaxis(jnp.transpose(parts, (0, 2, 3, 1, 4)), 1, 0)
    q = q * (width // heads) ** -0.5
    # bfloat16 has 8 bits of mantissa: too few for logits and for sums.
    kind = accurate(q.dtype)
    logits = jnp.einsum("banc,bamc->banm", q, k, preferred_element_type=kind)
    logits = logits if offset is None else logits + offset.astype(kind)
    weights = jax.nn.softmax(logits, axis=-1)
    mixed = jnp.einsum("banm,bamc->banc", weights.astype(v.dtype), v)
    return jnp.moveaxis(mixed, 1, 2).reshape(rows, tokens, width), weights


def repeated(parameter: Any, like: Array) -> Array:
    """A parameter, repeated to the shape of an array and then cast to its dtype.

    In this order the parameter's gradient is a sum in its own dtype. In the other order
    JAX would sum it in bfloat16: over 96 images of 197 tokens that lost a quarter to
    two fifths of the gradients of biases.
    """
    return jnp.broadcast_to(parameter, like.shape).astype(like.dtype)


def accurate(dtype: Any) -> jnp.dtype:
    """The dtype for sums and exponentials: float32, or `dtype` if that is wider."""
    return max(jnp.dtype("float32"), jnp.dtype(dtype), key=lambda kind: kind.itemsize)
