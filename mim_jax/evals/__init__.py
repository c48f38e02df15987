# SPDX-License-Identifier: Apache-2.0
"""Evaluations by name."""

from mim_jax.evals.knn import KNN
from mim_jax.evals.reconstruction import Reconstruction

EVALS = {"reconstruction": Reconstruction, "knn": KNN}
