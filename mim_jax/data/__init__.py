# SPDX-License-Identifier: Apache-2.0
"""Records from a source, examples from records, batches for one host."""
