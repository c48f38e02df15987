# SPDX-License-Identifier: Apache-2.0
"""Losses per example or per patch, never averaged: the caller weighs them."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def patch_mse(
    prediction: Float[Array, "b n p"], target: Float[Array, "b n p"]
) -> Float[Array, "b n"]:
    """Mean squared error of each patch vector, in the unit of the target squared.

    Computed in the target's precision (float32 or better), whatever the prediction's.
    """
    error = prediction.astype(target.dtype) - target
    return jnp.mean(error * error, axis=-1)
