# SPDX-License-Identifier: Apache-2.0
"""Tokenizers by name."""

from mim_jax.tokenizers.base import Tokenizer
from mim_jax.tokenizers.kmeans import KMeans

TOKENIZERS: dict[str, type[Tokenizer]] = {"kmeans": KMeans}
