# SPDX-License-Identifier: Apache-2.0
"""Crops of one image, with a tree of the regions that look alike."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from mim_jax.data.examples.base import Examples
from mim_jax.data.examples.crops import Crops
from mim_jax.data.fields import Example, Fields, FieldSpec
from mim_jax.data.geometry import Geometry
from mim_jax.schema import check_ranges, within
from mim_jax.theory.trees import numbered


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regions(Examples):
    """What `crops` makes, and a field `tree` for masking `subtrees`.

    Ward's clustering merges neighbouring patches that have alike mean and deviation of
    each channel. Level l of the tree has patches / 4**l regions of connected patches,
    rounded up, of any size and form; each region of a level is the union of regions
    below. `tree` is int32 (levels, rows, columns), the number of each patch's region at
    level 1, 2, ...; it is made anew for every random crop.

    It is one answer to what arXiv:2306.04898, section 3.6, asks for: masks guided by
    the structure of the image. scikit-learn clusters.

    Attributes:
        patch: side of a patch in pixels; want that of the encoder.
        levels: of the tree.
    """

    patch: int = within(16, least=1, most=2**10)
    levels: int = within(2, least=1, most=8)

    def __post_init__(self):
        check_ranges(self)

    def fields(self, data: Geometry) -> Fields:
        return self._with_tree(Crops().fields(data), data)

    def eval_fields(self, data: Geometry) -> Fields:
        return self._with_tree(Crops().eval_fields(data), data)

    def train(
        self, record: Mapping[str, Any], data: Geometry, rng: np.random.Generator
    ) -> Example:
        return self._seen(Crops().train(record, data, rng))

    def evaluate(self, record: Mapping[str, Any], data: Geometry) -> Example:
        return self._seen(Crops().evaluate(record, data))

    def advice(self, name: str) -> str:
        return Crops().advice(name)

    def _with_tree(self, fields: Fields, data: Geometry) -> Fields:
        rows, cols = data.image_size
        if rows % self.patch or cols % self.patch:
            raise ValueError(
                f"patch={self.patch} of images of {rows}x{cols} pixels: want a side "
                "that divides both"
            )
        if "tree" in fields:
            raise ValueError(
                "the source declares a field tree already: want examples=crops, which "
                "pass it through"
            )
        shape = (self.levels, rows // self.patch, cols // self.patch)
        return fields | {"tree": FieldSpec(shape, np.int32)}

    def _seen(self, example: Example) -> Example:
        return example | {
            "tree": region_tree(example["image"], self.patch, self.levels)
        }


def region_tree(
    image: UInt8[np.ndarray, "h w c"], patch: int, levels: int
) -> Int[np.ndarray, "levels rows cols"]:
    """The region of each patch at levels 1, 2, ..., see `Regions`.

    Regions of a level are numbered in the order of their first patches.
    """
    # Slow to import, and other examples do not need it.
    from sklearn.cluster import ward_tree

    height, width, channels = image.shape
    rows, cols = height // patch, width // patch
    count = rows * cols
    blocks = image.reshape(rows, patch, cols, patch, channels).astype(np.float32)
    looks = [blocks.mean(axis=(1, 3)), blocks.std(axis=(1, 3))]
    looks = np.concatenate(looks, axis=-1).reshape(count, -1)
    merges = ward_tree(looks, connectivity=_neighbours(rows, cols))[0]
    tree = np.zeros((levels, count), np.int32)
    for level in range(1, levels + 1):
        regions = -(-count // 4**level)
        # Each merge makes the next node; the first ones leave so many regions.
        node = np.arange(2 * count - 1)
        for number in range(count - regions - 1, -1, -1):
            node[merges[number]] = node[count + number]
        tree[level - 1] = numbered(node[:count])
    return tree.reshape(levels, rows, cols)


@functools.cache
def _neighbours(rows: int, cols: int):
    """Which patches share a side, as a sparse matrix."""
    from sklearn.feature_extraction.image import grid_to_graph

    return grid_to_graph(rows, cols)
