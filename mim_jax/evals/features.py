# SPDX-License-Identifier: Apache-2.0
"""Features of every image of a pass."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from mim_jax.evals.base import Batch, watched


class Features(NamedTuple):
    """Features of images, in the order of the pass.

    Attributes:
        vectors: one row per image.
        labels: -1 where unknown.
        indices: of the records in their source.
    """

    vectors: Float[np.ndarray, "n d"]
    labels: Int[np.ndarray, " n"]
    indices: Int[np.ndarray, " n"]


def extract(
    encode: Callable[[Any, Any], jax.Array], params: Any, batches: Iterable[Batch]
) -> Features:
    """Features of all valid images, with a progress bar on a terminal.

    Args:
        encode: from parameters and uint8 images "b h w c" to features "b d"; jitted
            here, and compiled once for all passes of one objective's method.
        params: its first argument.
    Raises:
        ValueError: there is no valid image.
    """
    jitted = jax.jit(encode)
    vectors, labels, index = [], [], []
    for batch in watched(batches, "features"):
        valid = np.asarray(batch["valid"])
        vectors.append(np.asarray(jitted(params, batch["image"]), np.float32)[valid])
        labels.append(np.asarray(batch["label"])[valid])
        index.append(np.asarray(batch["index"])[valid])
    if not sum(map(len, labels)):
        raise ValueError("features: the split has no images")
    return Features(*(np.concatenate(part) for part in (vectors, labels, index)))
