# SPDX-License-Identifier: Apache-2.0
"""Images from a source to batches of one host."""
