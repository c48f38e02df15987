# SPDX-License-Identifier: Apache-2.0
"""Maskings by name."""

from mim_jax.maskings.affinity import Affinity
from mim_jax.maskings.block import Block
from mim_jax.maskings.box import Box
from mim_jax.maskings.grid import GridMasking
from mim_jax.maskings.none import Nothing
from mim_jax.maskings.random import Random
from mim_jax.maskings.subtrees import Subtrees

MASKINGS = {
    "random": Random,
    "block": Block,
    "grid": GridMasking,
    "subtrees": Subtrees,
    "affinity": Affinity,
    "box": Box,
    "none": Nothing,
}
