# SPDX-License-Identifier: Apache-2.0
"""Losses that compare tokens of two branches over a whole, possibly sharded, batch."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mim_jax.ops.attention import accurate

Negatives = Literal["same_position", "same_image", "all"]


def info_nce(
    query: Float[Array, "b n d"],
    key: Float[Array, "b n d"],
    temperature: float,
    negatives: Negatives = "same_position",
    chunk: int = 14,
) -> Float[Array, "b n"]:
    """Contrastive loss of each query token against tokens of the other branch.

    The positive is the key of the same image and position. Forward and backward pass
    compute logits for `chunk` positions at a time. On D devices these take
    chunk * b * b / D numbers for "same_position", the only choice for large batches;
    chunk * b * n / D for "same_image"; chunk * b * b * n / D for "all".

    Args:
        query, key: tokens of the global batch; this function normalises their length.
        temperature: divides cosine similarity, > 0; smaller is sharper.
        negatives: keys that the denominator sums over: those of the "same_position" in
            all images, of all positions in the "same_image", or "all" keys. The
            positive is one of them.
        chunk: query positions per round, >= 1.
    Returns:
        Loss per token in nats, float32 or wider, >= 0; the caller averages it.
    Raises:
        ValueError: temperature or chunk out of range.
    Source: Eq. (9) of arXiv:2208.04164; one token per image is MoCo v3's loss
        (arXiv:2104.02057) without its factor of twice the temperature.
    """
    if not temperature > 0 or chunk < 1:
        raise ValueError(
            f"temperature={temperature}, chunk={chunk}: want temperature > 0 and "
            "chunk >= 1"
        )
    tokens = query.shape[1]
    chunk = min(chunk, tokens)
    rounds = -(-tokens // chunk)
    kind = accurate(query.dtype)

    def similar(pattern, one, other):
        logits = jnp.einsum(pattern, one, other, preferred_element_type=kind)
        return logits / temperature

    whole = l2_normalise(key) if negatives != "same_position" else key

    # The backward pass recomputes the logits: saved, they would take b * b * n numbers.
    @jax.checkpoint
    def part(q, k, whole):
        q, k = l2_normalise(q), l2_normalise(k)
        match = (q.astype(kind) * k.astype(kind)).sum(axis=-1) / temperature
        if negatives == "same_position":
            against = jax.nn.logsumexp(similar("bpd,jpd->pbj", q, k), axis=-1).T
        elif negatives == "same_image":
            against = jax.nn.logsumexp(similar("bpd,bnd->bpn", q, whole), axis=-1)
        else:
            logits = similar("bpd,jnd->bpjn", q, whole)
            against = jax.nn.logsumexp(logits, axis=(-2, -1))
        return against - match

    if rounds == 1:
        return part(query, key, whole)

    def split(x):
        short = rounds * chunk - tokens
        x = jnp.pad(x, ((0, 0), (0, short), (0, 0)))
        return jnp.moveaxis(x.reshape(x.shape[0], rounds, chunk, -1), 1, 0)

    parts = jax.lax.map(lambda pair: part(*pair, whole), (split(query), split(key)))
    return jnp.moveaxis(parts, 0, 1).reshape(query.shape[0], -1)[:, :tokens]


def cosine_distance(
    query: Float[Array, "b n d"], key: Float[Array, "b n d"]
) -> Float[Array, "b n"]:
    """BYOL's loss of each token, 2 - 2 cos, in 0..4 (arXiv:2006.07733, Eq. 2)."""
    kind = accurate(query.dtype)
    product = l2_normalise(query.astype(kind)) * l2_normalise(key.astype(kind))
    return 2 - 2 * product.sum(axis=-1)


def l2_normalise(x: Float[Array, "*b d"], axis: int = -1) -> Float[Array, "*b d"]:
    """Scales the vectors along an axis to length 1; computes in float32 or wider and
    returns the dtype of `x`."""
    wide = x.astype(accurate(x.dtype))
    square = (wide * wide).sum(axis=axis, keepdims=True)
    return (wide * jax.lax.rsqrt(square + 1e-12)).astype(x.dtype)
