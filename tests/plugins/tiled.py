# SPDX-License-Identifier: Apache-2.0
"""A form of attention from outside the package: tiles of keys, one after the other.

PYTHONPATH=tests/plugins python -m mim_jax.main --plugins=tiled \
    --config=configs/mae.py:digits --config.attention=tiled --workdir=runs/tiled
"""

import functools

import jax
import jax.numpy as jnp

from mim_jax.kernels import FORMS
from mim_jax.kernels.base import Form
from mim_jax.ops.attention import accurate, repeated

TILE = 8  # keys that are read together


def tiled_attention(qkv, bias, heads):
    """Attention with the weights of one tile in memory, arXiv:2112.05682.

    Args:
        qkv: queries, keys and values side by side, without their bias, "b n e".
        bias: theirs, "e", float32 whatever qkv is; `repeated` adds it so that its
            gradient is summed in float32.
    Returns:
        The mixed values "b n e//3".
    """
    rows, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    parts = (qkv + repeated(bias, qkv)).reshape(rows, tokens, 3, heads, width // heads)
    q, k, v = jnp.moveaxis(parts, 2, 0)
    q, kind = q * q.shape[-1] ** -0.5, accurate(q.dtype)
    count = -(-tokens // TILE)
    real = (jnp.arange(count * TILE) < tokens).reshape(count, TILE)

    def tiles(x):  # "b n a c" to "count b TILE a c", filled with zeros
        fill = ((0, 0), (0, count * TILE - tokens), (0, 0), (0, 0))
        x = jnp.pad(x, fill).reshape(rows, count, TILE, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    start = (
        jnp.full((rows, heads, tokens), jnp.finfo(kind).min, kind),
        jnp.zeros((rows, heads, tokens), kind),
        jnp.zeros((rows, heads, tokens, width // heads), kind),
    )
    step = jax.checkpoint(functools.partial(_add_tile, q))  # keeps no weights
    (_, total, mixed), _ = jax.lax.scan(step, start, (tiles(k), tiles(v), real))
    mixed = (mixed / total[..., None]).astype(qkv.dtype)
    return jnp.moveaxis(mixed, 1, 2).reshape(rows, tokens, width)


def _add_tile(q, sums, tile):
    """Softmax so far: its largest logit, sum of exponentials, and mixed values."""
    (top, total, mixed), (k, v, real) = sums, tile
    kind = total.dtype
    logits = jnp.einsum("bnac,bmac->banm", q, k, preferred_element_type=kind)
    logits = jnp.where(real[None, None, None], logits, -jnp.inf)
    highest = jnp.maximum(top, logits.max(axis=-1))
    raised, shrink = jnp.exp(logits - highest[..., None]), jnp.exp(top - highest)
    added = jnp.einsum(
        "banm,bmac->banc", raised.astype(v.dtype), v, preferred_element_type=kind
    )
    total = total * shrink + raised.sum(axis=-1)
    return (highest, total, mixed * shrink[..., None] + added), None


def misfit(site):
    """Why this form cannot run at a site; "" if it can."""
    if site.tokens <= TILE:
        return f"{site.tokens} tokens are one tile: want more than {TILE}"
    return ""


# "auto" takes a form only where its `preferred` says so: --config.attention=tiled.
FORMS["tiled"] = Form(tiled_attention, "cpu", misfit)
