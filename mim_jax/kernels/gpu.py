# SPDX-License-Identifier: Apache-2.0
"""Attention for GPUs: cuDNN's fused kernel, through JAX."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mim_jax.kernels.base import Site
from mim_jax.ops.attention import repeated

# On an H200, forward and gradient take 1.4 times the plain form's time for 50 tokens,
# and .57 of it for 148; docs/performance.md. Nothing between was measured.
_LONG = 100


def misfit(site: Site) -> str:
    """Why cuDNN cannot run at a site; "" if it can."""
    if site.dtype not in ("bfloat16", "float16"):
        return f"activations are {site.dtype}: want bfloat16 or float16"
    if not _ampere(site.capability):
        return f"compute capability {site.capability!r}: want CUDA's 8.0 or later"
    size = site.width // site.heads
    if size % 8 or size > 128:
        return f"heads of {size} numbers: want a multiple of 8, at most 128"
    return ""


def preferred(site: Site) -> bool:
    """Whether the longest sequence of the network is long: short ones take less time in
    the plain form."""
    return site.tokens >= _LONG


def _ampere(capability: str) -> bool:
    """Whether this is a capability of CUDA, and of an A100 or a later GPU."""
    major, dot, _ = capability.partition(".")
    return bool(dot) and int(major) >= 8


def cudnn_attention(
    qkv: Float[Array, "b n e"], bias: Float[Array, " e"], heads: int
) -> Float[Array, "b n e//3"]:
    """Attention by cuDNN, which keeps no weights for the gradient.

    Raises:
        RuntimeError: cuDNN is not installed. JAX looks for it when it traces.
    """
    rows, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    parts = (qkv + repeated(bias, qkv)).reshape(rows, tokens, 3, heads, width // heads)
    lengths = None
    if tokens % 2:
        # JAX refuses the gradient of an odd number of tokens, such as 14 x 14 patches
        # and a class token. So one is added, and cuDNN is told to ignore it.
        parts = jnp.pad(parts, ((0, 0), (0, 1), (0, 0), (0, 0), (0, 0)))
        lengths = jnp.full(rows, tokens, jnp.int32)
    q, k, v = parts[:, :, 0], parts[:, :, 1], parts[:, :, 2]
    mixed = jax.nn.dot_product_attention(
        q,
        k,
        v,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
    return mixed[:, :tokens].reshape(rows, tokens, width)
