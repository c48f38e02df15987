# SPDX-License-Identifier: Apache-2.0
"""One operation, one form per platform."""
