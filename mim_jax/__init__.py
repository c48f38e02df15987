# SPDX-License-Identifier: Apache-2.0
"""Masked image modelling in JAX: MAE, R-MAE and C-MAE, and what they learn.

`mim_jax.load_encoder` turns a run directory into an encoder of images.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mim_jax.run.pretrained import load_encoder as load_encoder

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported when it is used: `import mim_jax` alone must not import JAX.
    if name == "load_encoder":
        from mim_jax.run.pretrained import load_encoder

        return load_encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), "load_encoder"]
