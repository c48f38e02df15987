# SPDX-License-Identifier: Apache-2.0
"""`python -m mim_jax` and the command `mim-jax` are `python -m mim_jax.main`."""

from mim_jax.run import memory

memory.keep_freed()

from mim_jax.main import start  # noqa: E402 - imports JAX

if __name__ == "__main__":
    start()
