# SPDX-License-Identifier: Apache-2.0
"""Attention for CPUs: the weights are computed again for the gradient.

What costs on a CPU is moving n x n weights to memory and back. This form keeps none.
Where an image has many, the gradient goes image by image, so that they fit the cache.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mim_jax.kernels.base import Site
from mim_jax.ops.attention import accurate

# Bytes of weights of an image from which the gradient goes image by image, and "auto"
# takes this form; docs/performance.md has the measurements.
LOOP_BYTES = 2**19


def misfit(site: Site) -> str:
    """This form runs at every site of its platform."""
    del site
    return ""


def preferred(site: Site) -> bool:
    """Whether the weights are so many that computing them again is cheaper."""
    return site.heads * site.tokens**2 * 4 >= LOOP_BYTES


def recomputing_attention(
    qkv: Float[Array, "b n e"], bias: Float[Array, " e"], heads: int
) -> Float[Array, "b n e//3"]:
    """Attention that keeps no weights for the gradient."""
    rows, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    parts = (qkv + bias[None, None]).reshape(rows, tokens, 3, heads, width // heads)
    mixed = _attention(jnp.transpose(parts, (0, 2, 3, 1, 4)))
    return jnp.moveaxis(mixed, 1, 2).reshape(rows, tokens, width)


# A function of one array: the gradients of three slices of it would be padded and
# added.
@jax.custom_vjp
def _attention(parts: Float[Array, "b 3 a n c"]) -> Float[Array, "b a n c"]:
    q, k, v = _scaled(parts)
    raised, scale = _softmax(q, k)
    mixed = jnp.einsum("...nm,...mc->...nc", raised.astype(v.dtype), v)
    return mixed * scale.astype(v.dtype)


def _backward(parts, gradient):
    _, heads, tokens, _ = gradient.shape
    if heads * tokens**2 * 4 < LOOP_BYTES:
        return (jax.vmap(_gradients)(parts, gradient),)
    return (jax.lax.map(lambda image: _gradients(*image), (parts, gradient)),)


def _gradients(
    parts: Float[Array, "3 a n c"], gradient: Float[Array, "a n c"]
) -> Float[Array, "3 a n c"]:
    q, k, v = _scaled(parts)
    raised, scale = _softmax(q, k)
    weights = raised * scale
    dv = jnp.einsum("anm,anc->amc", weights.astype(v.dtype), gradient)
    dw = _products(gradient, v)
    ds = weights * (dw - (weights * dw).sum(axis=-1, keepdims=True))
    ds = ds.astype(q.dtype)
    dq = jnp.einsum("anm,amc->anc", ds, k) * parts.shape[-1] ** -0.5
    return jnp.stack([dq, jnp.einsum("anm,anc->amc", ds, q), dv])


_attention.defvjp(lambda parts: (_attention(parts), parts), _backward)


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
