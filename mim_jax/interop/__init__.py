# SPDX-License-Identifier: Apache-2.0
"""Weights as single files: what a run learned, without its optimiser."""
