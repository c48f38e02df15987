# SPDX-License-Identifier: Apache-2.0
"""Compiles training steps for devices this machine lacks, and reports their cost."""
