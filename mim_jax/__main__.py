# SPDX-License-Identifier: Apache-2.0
"""`python -m mim_jax` and the command `mim-jax` are `python -m mim_jax.main`."""

from mim_jax.run import memory


def start() -> None:
    """Set the process up before it imports JAX, then run the program."""
    memory.keep_freed()
    from mim_jax import main

    main.start()


if __name__ == "__main__":
    start()
