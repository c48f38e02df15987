# SPDX-License-Identifier: Apache-2.0
"""The latent tree of images, estimated from the ranks of covariances.

arXiv:2306.04898, section 3.6, proposes to find the latent structure by causal discovery
with rank constraints (its references 29 and 62) and to mask along it. Here is what that
needs for trees. In a linear Gaussian tree whose latents have r dimensions, two patches
have r canonical correlations that are not zero. Minus the logarithm of their product is
a distance that adds up along the way from one patch to the other. So siblings are
nearest, and clustering by this distance gives the tree.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Real
from scipy.cluster.hierarchy import average, cut_tree
from scipy.spatial.distance import squareform

from mim_jax.theory.trees import numbered

Patches = Real[np.ndarray, "images n p"]
_LEAST = 1e-6  # a correlation that counts as this much, so that logarithms are finite


class Structure(NamedTuple):
    """An estimated tree.

    Attributes:
        rank: dimensions that a patch shares with its nearest patch: the median over
            patches.
        distances: between patches, 0 for a patch and itself.
        tree: the group of each patch at levels 1, 2, ..., as field `tree` of source
            `hierarchy` in one row: level l has n / branching**l groups, numbered by
            their first patches.
    """

    rank: int
    distances: Float[np.ndarray, "n n"]
    tree: Int[np.ndarray, "levels n"]


def estimate(patches: Patches, levels: int, branching: int = 4) -> Structure:
    """The latent tree above the patches of images.

    Args:
        patches: the pixels of each patch of each image, any units; at least twice as
            many images as pixels of a patch.
        levels: of the tree, above the patches.
        branching: children of a latent.
    Raises:
        ValueError: too few images, or levels that n patches do not have.
    """
    images, count, pixels = patches.shape
    if images < 2 * pixels:
        raise ValueError(
            f"{images} images for patches of {pixels} numbers: want at least "
            f"{2 * pixels}, twice as many"
        )
    if not 1 <= levels or branching < 2 or branching**levels > count:
        raise ValueError(
            f"levels={levels} of branching={branching} above {count} patches: want "
            "branching >= 2 and 1 <= levels, with branching**levels at most the number "
            "of patches"
        )
    found = correlations(patches)
    ranks = (found > edge(images, pixels)).sum(axis=-1)
    nearest = (found**2).sum(axis=-1).argmax(axis=1)
    rank = max(1, int(np.median(ranks[np.arange(count), nearest])))
    distances = -np.log(np.maximum(found[..., :rank], _LEAST)).mean(axis=-1)
    np.fill_diagonal(distances, 0)
    merged = average(squareform(distances, checks=False))
    groups = [-(-count // branching**level) for level in range(1, levels + 1)]
    tree = [numbered(cut_tree(merged, number)[:, 0]) for number in groups]
    return Structure(rank, distances, np.stack(tree))


def correlations(patches: Patches) -> Float[np.ndarray, "n n p"]:
    """The canonical correlations of every two patches, the greatest first; 0 for a
    patch and itself.

    Directions of a patch that do not vary count as uncorrelated.
    """
    images, count, pixels = patches.shape
    whitened = np.zeros((count, images, pixels))
    for patch, values in enumerate(np.asarray(patches, float).transpose(1, 0, 2)):
        left, length, _ = np.linalg.svd(
            values - values.mean(axis=0), full_matrices=False
        )
        whitened[patch] = left * (length > 1e-9 * max(length[0], 1e-300))
    found = np.zeros((count, count, pixels))
    for one in range(count):
        products = np.einsum("ip,niq->npq", whitened[one], whitened[one + 1 :])
        values = np.linalg.svd(products, compute_uv=False)
        found[one, one + 1 :] = found[one + 1 :, one] = np.minimum(values, 1)
    return found


def edge(images: int, pixels: int) -> float:
    """The canonical correlation above which two patches are related.

    It is a tenth above the edge of those that chance gives to unrelated patches.

    Source: K. Wachter, The limiting empirical measure of multiple discriminant ratios,
    Annals of Statistics 8 (1980).
    """
    share = pixels / images
    return 1.1 * min(1.0, 2 * float(np.sqrt(share * (1 - share))))


def agreement(found: Int[np.ndarray, " n"], truth: Int[np.ndarray, " n"]) -> float:
    """How alike two groupings are: the adjusted Rand index. It is 1 if they are the
    same, and 0 in the mean of random ones."""
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(truth, found))
