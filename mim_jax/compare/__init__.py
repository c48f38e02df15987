# SPDX-License-Identifier: Apache-2.0
"""Several runs on one page: its job, its table and its sections."""

from mim_jax.compare.job import run as run
