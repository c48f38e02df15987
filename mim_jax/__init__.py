# SPDX-License-Identifier: Apache-2.0
"""Masked image modelling in JAX: MAE, R-MAE and C-MAE, and what they learn.

`mim_jax.load` turns a run directory, or weights of another program, into a model of
images; `mim_jax.load_encoder` is for those that need its features alone.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mim_jax.interop.pretrained import Pretrained as Pretrained
    from mim_jax.interop.pretrained import load as load
    from mim_jax.interop.pretrained import load_encoder as load_encoder

__version__ = "0.1.0"
__all__ = ["Pretrained", "__version__", "load", "load_encoder"]

_LAZY = ("Pretrained", "load", "load_encoder")


def __getattr__(name: str) -> Any:
    # Imported when it is used: `import mim_jax` alone must not import JAX.
    if name in _LAZY:
        from mim_jax.interop import pretrained

        return getattr(pretrained, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_LAZY]
