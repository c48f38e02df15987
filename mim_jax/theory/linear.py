# SPDX-License-Identifier: Apache-2.0
"""The masked autoencoder that is linear, solved in closed form on a Gaussian tree.

Every node is a sum of independent noises of variance 1, so it is a row of numbers, one
for each noise, and covariances are products of rows.
"""

import numpy as np
from jaxtyping import Bool, Float

from mim_jax.theory.trees import Tree

Rows = Float[np.ndarray, "_n noises"]
_RANK = 1e-6  # of a singular value that counts, as a share of the largest


def cascade(tree: Tree, keep: float) -> Rows:
    """The nodes of a tree with correlation `keep` between parent and child.

    A root is its noise, and a child is keep * parent + sqrt(1 - keep**2) * noise: all
    variances are 1. Noises are numbered as the nodes.
    """
    found = np.eye(len(tree.parents))
    for node in np.argsort(tree.depths, kind="stable"):
        if (parent := tree.parents[node]) >= 0:
            found[node] *= np.sqrt(1 - keep**2)
            found[node] += keep * found[parent]
    return found


def prediction(hidden: Rows, visible: Rows) -> Rows:
    """The expectation of the hidden rows given the visible ones: the best prediction,
    and the output of the best linear masked autoencoder. No visible row may follow from
    the others."""
    return hidden @ visible.T @ np.linalg.solve(visible @ visible.T, visible)


def code(predicted: Rows, width: int | None) -> Rows:
    """What the bottleneck of the best linear masked autoencoder holds: orthonormal
    rows, the directions of most variance of its output.

    Args:
        width: of the bottleneck; None: as wide as the output has directions.
    """
    _, values, directions = np.linalg.svd(predicted, full_matrices=False)
    directions = directions[values > _RANK * values[0]]
    return directions if width is None else directions[:width]


def recovered(
    tree: Tree, keep: float, hidden: Bool[np.ndarray, " leaves"], width: int | None
) -> Float[np.ndarray, " n"]:
    """How much of each node the code of a mask holds: R2 of the best linear read-out.

    Args:
        keep: as for `cascade`.
        hidden: True at the hidden pixels, in the order of `Tree.leaves`.
        width: as for `code`.
    """
    rows = cascade(tree, keep)
    pixels = rows[tree.leaves]
    held = code(prediction(pixels[hidden], pixels[~hidden]), width)
    return ((rows @ held.T) ** 2).sum(axis=1)
