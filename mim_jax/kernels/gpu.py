# SPDX-License-Identifier: Apache-2.0
"""Attention for GPUs: cuDNN's fused kernel, through JAX."""

import jax
from jaxtyping import Array, Float

from mim_jax.kernels.base import Site


def misfit(site: Site) -> str:
    """Why cuDNN cannot run at a site; "" if it can."""
    if site.dtype not in ("bfloat16", "float16"):
        return f"activations are {site.dtype}: want bfloat16 or float16"
    size = site.width // site.heads
    if size % 8 or size > 128:
        return f"heads of {size} numbers: want a multiple of 8, at most 128"
    return ""


def cudnn_attention(
    qkv: Float[Array, "b n e"], bias: Float[Array, " e"], heads: int
) -> Float[Array, "b n e//3"]:
    """Attention by cuDNN, which keeps no weights for the gradient.

    Raises:
        RuntimeError: no GPU with cuDNN is here. JAX asks for one when it traces.
    """
    rows, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    parts = (qkv + bias[None, None]).reshape(rows, tokens, 3, heads, width // heads)
    q, k, v = parts[:, :, 0], parts[:, :, 1], parts[:, :, 2]
    mixed = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    return mixed.reshape(rows, tokens, width)
