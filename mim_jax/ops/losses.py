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
