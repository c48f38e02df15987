# SPDX-License-Identifier: Apache-2.0
"""Masked image modelling in JAX: MAE, R-MAE and C-MAE, and what they learn."""

__version__ = "0.1.0"
