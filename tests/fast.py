# SPDX-License-Identifier: Apache-2.0
"""Programs that run for milliseconds: compiling them well does not pay."""

import contextlib

import jax
import sklearn.manifold  # noqa: F401  (so that its threads are limited, too)
import threadpoolctl


@contextlib.contextmanager
def compilation():
    """Compile quickly, and let no thread of a library wait for a core."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        with threadpoolctl.threadpool_limits(1):
            yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
