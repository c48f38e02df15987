# SPDX-License-Identifier: Apache-2.0
"""How evaluations hide patches from an encoder."""

from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from mim_jax.evals.base import Run
from mim_jax.evals.images import hidden_pixels
from mim_jax.objectives.base import Objective
from mim_jax.ops.masking import Mask

# "model" does what the encoder saw in training (`Objective.occlusion`).
Choice = Literal["model", "drop", "mask_token", "zero"]
# How hidden patches are called in figures.
IN_WORDS = {
    "drop": "dropped",
    "mask_token": "replaced by mask tokens",
    "zero": "painted with the mean",
}


def resolved(choice: Choice, run: Run) -> str:
    """The way to hide patches, a key of IN_WORDS.

    Raises:
        ValueError: mask tokens are asked for, and the encoder has none.
    """
    how = run.objective.occlusion if choice == "model" else choice
    if how == "mask_token" and "mask_token" not in run.params["encoder"]:
        raise ValueError(
            f"occlusion={choice!r}: the encoder of {run.name} has no mask token; want "
            "'drop' or 'zero'"
        )
    return how


def encode_occluded(
    objective: Objective,
    how: str,
    params: Any,
    pixels: Float[Array, "b h w c"],
    mask: Mask,
    taps: Sequence[str] = ("blocks",),
) -> tuple[Float[Array, "b t d"], dict[str, Float[Array, "..."]]]:
    """Tokens and taps of the encoder, as of `Objective.encode`, for masked images.

    Args:
        how: "drop" leaves hidden patches out, "mask_token" puts the learned token in
            their place, "zero" paints them with the data's mean.
        pixels: in 0..1.
    """
    if how == "drop":
        return objective.encode(params, pixels, keep=mask.keep, taps=taps)
    if how == "mask_token":
        return objective.encode(params, pixels, hidden=mask.hidden, taps=taps)
    hidden = hidden_pixels(mask, objective.grid(pixels.shape[1:]))
    mean = jnp.asarray(objective.mean, pixels.dtype)[None, None, None]
    painted = jnp.where(hidden[..., None], mean, pixels)
    return objective.encode(params, painted, taps=taps)
