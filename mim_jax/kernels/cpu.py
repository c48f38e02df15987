# SPDX-License-Identifier: Apache-2.0
"""Attention for CPUs, which keeps the weights for the gradient or computes them again.

What costs on a CPU is moving n x n weights to memory and back. Where an image has many,
the gradient goes image by image, so that they fit the cache; so does the forward pass
of the form that keeps them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mim_jax.kernels.base import Site
from mim_jax.ops.attention import accurate, repeated

# Measured sizes are in docs/performance.md.
LOOP_BYTES = 2**19  # An image whose weights have so many bytes, or more, goes alone.
# "auto" keeps the weights of narrow heads below so many bytes of an image. More would
# be faster, too, and take too much memory.
KEPT_BYTES = 2**21
NARROW = 32  # Heads of at most so many numbers are narrow.


def misfit(site: Site) -> str:
    """Both forms run at every site of their platform."""
    del site
    return ""


def keep_preferred(site: Site) -> bool:
    """Whether the weights are few enough to be kept."""
    narrow = site.width // site.heads <= NARROW
    return _bytes(site.heads, site.tokens) < (KEPT_BYTES if narrow else LOOP_BYTES)


def keeping_attention(
    qkv: Float[Array, "b n e"], bias: Float[Array, " e"], heads: int
) -> Float[Array, "b n e//3"]:
    """Attention that keeps the weights for the gradient."""
    return _over_heads(_keeping, qkv, bias, heads)


def recomputing_attention(
    qkv: Float[Array, "b n e"], bias: Float[Array, " e"], heads: int
) -> Float[Array, "b n e//3"]:
    """Attention that keeps no weights for the gradient."""
    return _over_heads(_recomputing, qkv, bias, heads)


def _over_heads(run: Callable[..., Any], qkv, bias, heads: int):
    """Splits and joins heads around a function of "b 3 a n c"."""
    rows, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    parts = (qkv + repeated(bias, qkv)).reshape(rows, tokens, 3, heads, width // heads)
    mixed = run(jnp.transpose(parts, (0, 2, 3, 1, 4)))
    return jnp.moveaxis(mixed, 1, 2).reshape(rows, tokens, width)


# Functions of one array: the gradients of three slices of it would be padded and added.
@jax.custom_vjp
def _recomputing(parts: Float[Array, "b 3 a n c"]) -> Float[Array, "b a n c"]:
    return _mixed(parts)[0]


def _recomputed(
    parts: Float[Array, "3 a n c"], gradient: Float[Array, "a n c"]
) -> Float[Array, "3 a n c"]:
    return _gradients(parts, *_softmax(*_scaled(parts)[:2]), gradient)


_recomputing.defvjp(
    lambda parts: (_recomputing(parts), parts),
    lambda *given: (_by_image(_recomputed, *given),),
)


@jax.custom_vjp
def _keeping(parts: Float[Array, "b 3 a n c"]) -> Float[Array, "b a n c"]:
    return _kept(parts)[0]


def _kept(parts: Float[Array, "b 3 a n c"]):
    """Mixed values, and what the gradient needs."""
    mixed, *weights = _by_image(_mixed, parts)
    return mixed, (parts, *weights)


_keeping.defvjp(_kept, lambda kept, gradient: (_by_image(_gradients, *kept, gradient),))


def _by_image(run: Callable[..., Any], parts, *more):
    """A function of one image's arrays, for all images: one by one where an image has
    many weights."""
    _, _, heads, tokens, _ = parts.shape
    if _bytes(heads, tokens) < LOOP_BYTES:
        return jax.vmap(run)(parts, *more)
    return jax.lax.map(lambda image: run(*image), (parts, *more))


def _mixed(parts: Float[Array, "*b 3 a n c"]):
    """Mixed values; numerators of the weights, and 1 / their sums."""
    q, k, v = _scaled(parts)
    raised, scale = _softmax(q, k)
    numerators, kind = raised.astype(v.dtype), raised.dtype
    mixed = jnp.einsum("...nm,...mc->...nc", numerators, v, preferred_element_type=kind)
    return (mixed * scale).astype(v.dtype), raised, scale


def _gradients(
    parts: Float[Array, "3 a n c"],
    raised: Float[Array, "a n n"],
    scale: Float[Array, "a n 1"],
    gradient: Float[Array, "a n c"],
) -> Float[Array, "3 a n c"]:
    q, k, v = _scaled(parts)
    # A weight is raised * scale; the scale is cheaper to multiply by the gradient.
    scaled = (gradient.astype(scale.dtype) * scale).astype(gradient.dtype)
    dv = _over_queries(raised.astype(v.dtype), scaled)
    dw = _products(scaled, v)
    ds = raised * (dw - scale * (raised * dw).sum(axis=-1, keepdims=True))
    ds = ds.astype(q.dtype)
    dq = jnp.einsum("anm,amc->anc", ds, k) * parts.shape[-1] ** -0.5
    return jnp.stack([dq, _over_queries(ds, q), dv])


def _over_queries(
    weights: Float[Array, "a n m"], values: Float[Array, "a n c"]
) -> Float[Array, "a m c"]:
    """Sums over n. XLA multiplies by transposed weights slowly where c is small, so
    there the values are transposed; the barriers keep XLA from undoing that."""
    if values.shape[-1] > NARROW:
        return jnp.einsum("anm,anc->amc", weights, values)
    turned = jax.lax.optimization_barrier(jnp.swapaxes(values, -1, -2))
    return jnp.swapaxes(jax.lax.optimization_barrier(turned @ weights), -1, -2)


def _bytes(heads: int, tokens: int) -> int:
    """Of the weights of an image in float32."""
    return heads * tokens**2 * 4


def _scaled(parts):
    """q, divided by the root of the size of a head, k and v: each "... a n c"."""
    q, k, v = jnp.moveaxis(parts, -4, 0)
    return q * parts.shape[-1] ** -0.5, k, v


def _products(q, k):
    kind = accurate(q.dtype)
    return jnp.einsum("...nc,...mc->...nm", q, k, preferred_element_type=kind)


def _softmax(q, k):
    """Numerators, and 1 / their sums, of each row by itself."""
    logits = _products(q, k)
    raised = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    return raised, 1 / raised.sum(axis=-1, keepdims=True)
