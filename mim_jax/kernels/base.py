# SPDX-License-Identifier: Apache-2.0
"""What a form of attention is, and the value by which a network is told its forms."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

# Axes of a mesh over which the rows of a batch are split.
ROWS = ("data", "fsdp")

Attend = Callable[..., Any]  # of (qkv, bias, heads)


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The form of each operation that a network runs, chosen once by the plan.

    Every form computes the same function. The default runs everywhere.

    Attributes:
        attention: "plain", or a name of `mim_jax.kernels.FORMS`.
        merge_rows: dense layers merge the leading axes of their input first. XLA's CPU
            compiler then contracts one axis for the gradient of a kernel instead of
            several, which it runs faster (benchmarks/dense.py). On a TPU, where rows
            are padded to tiles, merging would copy.
        mesh: the devices that share the work, with axes "data", "fsdp" and "tensor";
            None for a single device.
    """

    attention: str = "plain"
    merge_rows: bool = False
    mesh: jax.sharding.Mesh | None = None


PLAIN = Kernels()


class Site(NamedTuple):
    """All that the choice of a form may depend on.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        device: kind of device as JAX names it, such as "TPU v5 lite".
        dtype: of activations, such as "bfloat16".
        tokens: length of the longest sequence, the class token included.
        width: of a token, in numbers; where devices share the heads, of those of one.
        heads: number of heads; likewise.
    """

    platform: str
    device: str
    dtype: str
    tokens: int
    width: int
    heads: int


class Form(NamedTuple):
    """A form of attention.

    Attributes:
        run: from (qkv "b n e", bias "e", heads) to mixed values "b n e//3", as the
            first result of `mim_jax.ops.attention.attention`.
        platform: the only one that can run it.
        misfit: says of a site why this form cannot run there; "" if it can.
        preferred: says whether "auto" takes it at a site where it can run.
    """

    run: Attend
    platform: str
    misfit: Callable[[Site], str]
    preferred: Callable[[Site], bool] = lambda site: True
