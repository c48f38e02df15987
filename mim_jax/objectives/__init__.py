# SPDX-License-Identifier: Apache-2.0
"""Objectives by name."""

from mim_jax.objectives.mae import MAE

OBJECTIVES = {"mae": MAE}
