# SPDX-License-Identifier: Apache-2.0
"""Environments for the processes that tests start."""

import atexit
import os
import shutil
import tempfile

# What conftest.py sets.
_OURS = {
    "JAX_PLATFORMS",
    "MPLBACKEND",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "XLA_FLAGS",
}


# What one of these processes compiles, the next need not; and the user's own folder of
# compiled programs stays as it is.
COMPILED = tempfile.mkdtemp(prefix="compiled-")
atexit.register(shutil.rmtree, COMPILED, ignore_errors=True)
_CACHE = {"JAX_COMPILATION_CACHE_DIR": COMPILED}


def newcomer(**variables: str) -> dict[str, str]:
    """A newcomer's environment, without the settings of these tests."""
    theirs = {name: text for name, text in os.environ.items() if name not in _OURS}
    return theirs | _CACHE | variables


def small(devices: int = 1, **variables: str) -> dict[str, str]:
    """An environment that compiles quickly, as these tests do, for some CPU devices."""
    # Of a flag that stands twice XLA takes the second.
    count = f"--xla_force_host_platform_device_count={devices}"
    flags = f"{os.environ['XLA_FLAGS']} {count}"
    ours = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return os.environ | ours | _CACHE | variables
