# SPDX-License-Identifier: Apache-2.0
"""Compile training steps for devices that are not here, and say what they cost."""
