# SPDX-License-Identifier: Apache-2.0
"""Features of every image of a pass."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from mim_jax.evals.base import Batch, Passes, Run
from mim_jax.evals.images import valid_images

# `jax.jit` itself compiles a method anew each time that it is taken from its object.
_jitted = functools.lru_cache(maxsize=16)(jax.jit)


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
    encode: Callable[[Any, Any], jax.Array],
    params: Any,
    batches: Iterable[Batch],
    most: int | None = None,
) -> Features:
    """Features of the valid images of a pass.

    Args:
        encode: from (parameters, uint8 images "b h w c") to features "b d". It is
            jitted here; a method of one objective compiles once for all passes and
            evaluations.
        params: the first argument of `encode`.
        most: number of images at most; None: all of them.
    Raises:
        ValueError: there is no valid image, or a feature is not finite.

    Example:
        >>> def brightness(params, images):
        ...     return images.reshape(len(images), -1).mean(axis=1, keepdims=True)
        >>> batch = {
        ...     "image": np.full((2, 4, 4, 1), 7, np.uint8),
        ...     "label": np.array([0, 1], np.int32),
        ...     "index": np.array([0, -1], np.int32),
        ...     "valid": np.array([True, False]),
        ... }
        >>> extract(brightness, None, [batch]).vectors.tolist()
        [[7.0]]
    """
    jitted = _jitted(encode)
    parts = []
    for batch, rows in valid_images(batches, "features", most):
        vectors = np.asarray(jitted(params, batch["image"]), np.float32)
        columns = (vectors, batch["label"], batch["index"])
        parts.append([np.asarray(column)[rows] for column in columns])
    found = Features(*(np.concatenate(part) for part in zip(*parts, strict=True)))
    check_finite(found.vectors, "features")
    return found


def check_finite(vectors: Float[np.ndarray, "n ..."], what: str) -> None:
    """ValueError if one of the rows that a network computed is not finite: comparisons
    with it would come out as ordinary numbers."""
    fine = np.isfinite(vectors).reshape(len(vectors), -1).all(axis=1)
    bad = len(vectors) - int(np.count_nonzero(fine))
    if bad:
        raise ValueError(
            f"the {what} of {bad} of {len(vectors)} images are not finite: the network "
            "overflows; want another checkpoint, or dtype=float32"
        )


def extract_splits(run: Run, params: Any, data: Passes) -> tuple[Features, Features]:
    """Features of the training images and of the held-out images, by
    `Objective.features` with these parameters.

    Raises:
        ValueError: a split has no valid image.
    """
    with data.train() as batches:
        train = extract(run.objective.features, params, batches)
    with data.held_out() as batches:
        return train, extract(run.objective.features, params, batches)


def l2_normalised(vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Rows scaled to length 1; rows of zeros stay zeros.

    Example:
        >>> l2_normalised(np.array([[3.0, 4.0]])).tolist()
        [[0.6, 0.8]]
    """
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(length, 1e-12)
