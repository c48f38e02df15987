# SPDX-License-Identifier: Apache-2.0
"""Theorem 1 of arXiv:2306.04898 as code: what hidden and visible pixels share.

Importing this needs NumPy and networkx alone. docs/theory.md explains the definitions.
"""

from mim_jax.theory.locating import Located, locate
from mim_jax.theory.trees import Tree

__all__ = ["Located", "Tree", "locate"]
