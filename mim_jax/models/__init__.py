# SPDX-License-Identifier: Apache-2.0
"""Neural networks: the only room with flax.linen."""
