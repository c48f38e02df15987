# SPDX-License-Identifier: Apache-2.0
"""Attention for TPUs over sequences too long for `tpu.short_attention`.

It is JAX's own splash attention, which works through the weights block by block and
never writes them to memory.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)
from jaxtyping import Array, Float

from mim_jax.kernels.base import Site

# Tokens of a block. Large ones read keys and values less often; the last block of a
# sequence is filled up.
_BLOCKS = (1024, 512, 384, 256, 128)
_MOST_WASTE = 1.05  # tokens after filling up, over those with the smallest block
_HEADS = (64, 128, 256)  # sizes of a head that its blocks can be laid out for


def misfit(site: Site) -> str:
    """Why the form cannot run at a site; "" if it can."""
    if site.dtype != "bfloat16":
        return f"activations are {site.dtype}: want bfloat16"
    size = site.width // site.heads
    if size not in _HEADS:
        return f"heads of {size}: want {', '.join(map(str, _HEADS))}"
    return ""


def block_of(tokens: int) -> int:
    """Tokens of a block: the largest that adds few tokens to the sequence."""
    least = _filled(tokens, _BLOCKS[-1])
    return next(
        block for block in _BLOCKS if _filled(tokens, block) <= _MOST_WASTE * least
    )


def long_attention(
    qkv: Float[Array, "b n e"],
    bias: Float[Array, " e"],
    heads: int,
    interpret: bool = False,
) -> Float[Array, "b n e//3"]:
    """Attention as TPU kernels that walk over blocks of queries and keys.

    Args:
        interpret: run it as plain JAX, on any backend.
    """
    rows, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    size, block = width // heads, block_of(tokens)
    filled = _filled(tokens, block)
    parts = (qkv + bias[None, None]).reshape(rows, tokens, 3, heads, size)
    parts = jnp.pad(parts, ((0, 0), (0, filled - tokens), (0, 0), (0, 0), (0, 0)))
    q, k, v = jnp.moveaxis(parts, (2, 3), (0, 2))
    kernel = splash.make_splash_mha(
        mask=masks.MultiHeadMask([masks.FullMask((filled, filled))] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            use_fused_bwd_kernel=True,
        ),
        interpret=interpret,
    )
    # Tokens attend to those of their own segment: real ones to real ones.
    segment = (jnp.arange(filled) >= tokens).astype(jnp.int32)
    segments = splash.SegmentIds(q=segment, kv=segment)
    q = q * jnp.asarray(size**-0.5, q.dtype)
    # Without residuals it returns the values alone.
    mixed: Any = jax.vmap(kernel, in_axes=(0, 0, 0, None))(q, k, v, segments)
    return jnp.moveaxis(mixed, 1, 2)[:, :tokens].reshape(rows, tokens, width)


def _filled(tokens: int, block: int) -> int:
    return math.ceil(tokens / block) * block
