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
        capability: of a GPU, as JAX names it: "9.0" of an H100, "gfx942" of an MI300X;
            "" elsewhere.
    """

    platform: str
    device: str
    dtype: str
    tokens: int
    width: int
    heads: int
    capability: str = ""


def always(site: Site) -> bool:
    """For `Form.preferred`: "auto" takes the form wherever it can run."""
    del site
    return True


def never(site: Site) -> bool:
    """For `Form.preferred`: "auto" never takes the form; its name does."""
    del site
    return False


class Form(NamedTuple):
    """A form of attention: a row of `mim_jax.kernels.FORMS`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from mim_jax.kernels import FORMS
        >>> from mim_jax.kernels.choice import choose_attention
        >>> from mim_jax.ops.attention import repeated
        >>> def by_jax(qkv, bias, heads):
        ...     rows, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        ...     parts = (qkv + repeated(bias, qkv)).reshape(rows, tokens, 3, heads, -1)
        ...     q, k, v = jnp.moveaxis(parts, 2, 0)
        ...     mixed = jax.nn.dot_product_attention(q, k, v)
        ...     return mixed.reshape(rows, tokens, width)
        >>> def misfit(site):
        ...     return "" if site.tokens < 1000 else "1000 tokens or more: want fewer"
        >>> FORMS["by_jax"] = Form(by_jax, "cpu", misfit)
        >>> site = Site("cpu", "cpu", "float32", tokens=197, width=768, heads=12)
        >>> choose_attention("by_jax", site)  # as --config.attention=by_jax does
        'by_jax'

    Attributes:
        run: from (qkv "b n e", bias "e", heads) to mixed values "b n e//3" of qkv's
            dtype, as the first result of `mim_jax.ops.attention.attention`; JAX
            differentiates it. The bias is float32, whatever qkv is: its gradient is a
            sum over all tokens (`mim_jax.ops.attention.repeated`).
        platform: the only one that can run it: "cpu", "gpu" or "tpu".
        misfit: says of a site why this form cannot run there; "" if it can.
        preferred: says whether "auto" takes it at a site where it can run. The default
            never does: state it once the form has been timed against the one that
            "auto" takes there. "auto" asks the rows of plug-ins before those of the
            package.
    """

    run: Attend
    platform: str
    misfit: Callable[[Site], str]
    preferred: Callable[[Site], bool] = never
