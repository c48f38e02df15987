# SPDX-License-Identifier: Apache-2.0
"""Keeping a run: its directory, checkpoints, log, signals, closing report."""
