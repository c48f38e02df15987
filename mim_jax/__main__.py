# SPDX-License-Identifier: Apache-2.0
"""`python -m mim_jax` is `python -m mim_jax.main`."""

from mim_jax.main import start

if __name__ == "__main__":
    start()
