# SPDX-License-Identifier: Apache-2.0
"""Losses per example; the caller weighs and averages them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def soft_labels(
    labels: Int[Array, " b"], classes: int, smoothing: float
) -> Float[Array, "b {classes}"]:
    """A target distribution per image; all zeros if the label is out of range.

    The true class gets 1 - smoothing (1 - 1 / classes), each other class
    smoothing / classes, arXiv:1512.00567.
    """
    known = (labels >= 0) & (labels < classes)
    targets = jax.nn.one_hot(labels, classes, dtype=jnp.float32)
    targets = targets * (1 - smoothing) + smoothing / classes
    return jnp.where(known[:, None], targets, 0)


def cross_entropy(
    logits: Float[Array, "b c"], targets: Float[Array, "b c"]
) -> Float[Array, " b"]:
    """Cross-entropy of each image in nats, for targets that need not sum to 1."""
    return -(targets * jax.nn.log_softmax(logits, axis=-1)).sum(axis=-1)


def sigmoid_cross_entropy(
    logits: Float[Array, "*shape"], targets: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Cross-entropy of each logit in nats, for targets in 0..1."""
    return (
        jnp.maximum(logits, 0) - logits * targets + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    )


def smooth_l1(
    errors: Float[Array, "*shape"], beta: float = 0.0
) -> Float[Array, "*shape"]:
    """Absolute errors, but half their squares by beta where they are below beta,
    arXiv:1504.08083, equation 3; beta=0 takes absolute errors everywhere."""
    sizes = jnp.abs(errors)
    if not beta:
        return sizes
    return jnp.where(sizes < beta, 0.5 * sizes**2 / beta, sizes - 0.5 * beta)
