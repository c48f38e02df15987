# SPDX-License-Identifier: Apache-2.0
"""Ridge regression in closed form, in float64 on the host."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int


def fit(
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    classes: int,
    penalties: Sequence[float],
) -> tuple[tuple[np.ndarray, np.ndarray], float]:
    """Ridge regression to class indicators, by the penalty that generalises best.

    Weights W and biases b minimise |X W + b - Y|^2 + penalty s |W|^2, where Y are the
    class indicators and s is the sum of squared lengths of centred features over n.
    Biases are not penalised. When row i is left out, its error is its residual over
    1 - h_i, where h_i is the leverage of the row.

    Args:
        penalties: to choose from.
    Returns:
        ((weights "d c", biases "c"), penalty) with the least leave-one-out error.

    Example:
        >>> features = np.array([[0.0], [0.1], [0.9], [1.0]])
        >>> (weights, biases), _ = fit(features, np.array([0, 0, 1, 1]), 2, (0.1,))
        >>> (features @ weights + biases).argmax(axis=1).tolist()
        [0, 0, 1, 1]
    """
    x, y = features.astype(np.float64), np.eye(classes)[labels]
    centre, level = x.mean(axis=0), y.mean(axis=0)
    x, centred = x - centre, y - level
    left, scale, right = np.linalg.svd(x, full_matrices=False)
    size = (scale**2).sum() / len(x) or 1.0
    best = None
    for penalty in penalties:
        shrunk = scale**2 / (scale**2 + penalty * size)
        residual = centred - left @ (shrunk[:, None] * (left.T @ centred))
        leverage = (left**2 * shrunk).sum(axis=1) + 1 / len(x)
        error = ((residual / np.maximum(1 - leverage, 1e-12)[:, None]) ** 2).mean()
        if best is None or error < best[0]:
            best = error, penalty
    assert best is not None
    weights = right.T @ (
        (scale / (scale**2 + best[1] * size))[:, None] * (left.T @ centred)
    )
    return (weights, level - centre @ weights), best[1]
