# SPDX-License-Identifier: Apache-2.0
"""Attention for TPUs over sequences too long for `tpu.short_attention`.

It is JAX's own splash attention, which works through the weights block by block. They
are never in memory; the gradient of the queries is, once per block of keys.
"""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mim_jax.kernels.base import Site
from mim_jax.kernels.tpu import LANES, up
from mim_jax.ops.attention import repeated

_SPLASH = "jax.experimental.pallas.ops.tpu.splash_attention"
_MOST = 1024  # tokens of a block, for which the vector memory of every TPU suffices
# Keys that take as long as what a step of the kernel costs besides its products. A
# guess: no TPU was at hand.
_OVERHEAD = 64
_SMALLEST, _LARGEST = 32, 128  # sizes of a head with which blocks were compiled
_LONG = 512  # tokens from which the compiler's account prefers it to the plain form


def misfit(site: Site) -> str:
    """Why the form cannot run at a site; "" if it can."""
    if site.dtype != "bfloat16":
        return f"activations are {site.dtype}: want bfloat16"
    size = site.width // site.heads
    if size % 8 or not _SMALLEST <= size <= _LARGEST:
        return f"heads of {size}: want a multiple of 8 from {_SMALLEST} to {_LARGEST}"
    if not _installed():
        return f"jax {jax.__version__} has no {_SPLASH}: want jax 0.10.2"
    return ""


def _installed() -> bool:
    try:
        return importlib.util.find_spec(_SPLASH) is not None
    except ModuleNotFoundError:  # of a package around it
        return False


def preferred(site: Site) -> bool:
    """Whether the sequence is long: short ones take less time in the plain form."""
    return site.tokens >= _LONG


def block_of(tokens: int) -> int:
    """Tokens of a block. The last block of a sequence is filled up; small blocks add
    few tokens, large ones need fewer steps."""

    def cost(block: int) -> float:
        return up(tokens, block) ** 2 * (1 + _OVERHEAD / block)

    return min(range(LANES, _MOST + LANES, LANES), key=cost)


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
    # Experimental in JAX: a version without it must still import this package.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    rows, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    size, block = width // heads, block_of(tokens)
    filled = up(tokens, block)
    parts = (qkv + repeated(bias, qkv)).reshape(rows, tokens, 3, heads, size)
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
