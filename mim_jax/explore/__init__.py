# SPDX-License-Identifier: Apache-2.0
"""A page on which a person tries one or two runs on an image."""
