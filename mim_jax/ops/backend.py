# SPDX-License-Identifier: Apache-2.0
"""Forms of the same mathematics that one backend runs faster than another."""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Shaped

_TARGET: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "target", default=None
)
_MESH: contextvars.ContextVar[jax.sharding.Mesh | None] = contextvars.ContextVar(
    "mesh", default=None
)

# Axes of a mesh over which the rows of a batch are split.
ROWS = ("data", "fsdp")


def target() -> str:
    """The platform that code traced now is meant for: "cpu", "gpu" or "tpu"."""
    return _TARGET.get() or jax.default_backend()


def target_mesh() -> jax.sharding.Mesh | None:
    """The devices that code traced now is meant for: axes ROWS and "tensor"."""
    return _MESH.get()


@contextlib.contextmanager
def compile_for(platform: str, mesh: jax.sharding.Mesh | None = None) -> Iterator[None]:
    """Trace for a platform, and devices, that need not be this machine's.

    Args:
        mesh: of those devices; None: not known here.
    """
    tokens = _TARGET.set(platform), _MESH.set(mesh)
    try:
        yield
    finally:
        _TARGET.reset(tokens[0])
        _MESH.reset(tokens[1])


def accurate(dtype: Any) -> jnp.dtype:
    """`dtype`, or float32 if that is wider: for sums and exponentials."""
    return max(jnp.dtype("float32"), jnp.dtype(dtype), key=lambda kind: kind.itemsize)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(
    kernel: Shaped[Array, "d f"], split: int | None = None
) -> Shaped[Array, "d f"]:
    """A kernel that `fsdp` devices share, whole on each of them: in a block, just
    before it is used, while its gradient is left in parts.

    Left to itself the compiler may send the activations instead, which are far larger.

    Args:
        split: the axis of which `tensor` devices keep a part each, if any.
    """
    return _laid_out(kernel, split, ("tensor",))


def _laid_out(kernel, split: int | None, axes: tuple[str, ...]):
    mesh = target_mesh()
    if mesh is None or mesh.shape["fsdp"] == 1:
        return kernel
    spec: list[Any] = [None, None]
    if split is not None:
        spec[split] = axes
    rule = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    size = math.prod(mesh.shape[axis] for axis in axes)
    if split is not None and kernel.shape[split] % size:
        return kernel  # as it is stored: whole
    return jax.lax.with_sharding_constraint(kernel, rule)


gathered.defvjp(
    lambda kernel, split: (gathered(kernel, split), None),
    lambda split, _, gradient: (_laid_out(gradient, split, ("tensor", "fsdp")),),
)


def made_if(ok: Bool[Array, ""], make: Callable[[], Any], old: Any) -> Any:
    """The tree that `make` returns where ok, else `old`, leaf by leaf.

    On the CPU a branch, not taken if not ok: selecting takes three times as long there.
    On a TPU selecting is part of what makes the leaf, and a branch cuts it off.
    """
    if target() == "cpu":
        return jax.lax.cond(ok, make, lambda: old)

    def leaf(new, old):
        return old if new is old else jnp.where(ok, new, old)

    return jax.tree.map(leaf, make(), old)


def dense_dot(
    x: Shaped[Array, "*batch d"],
    kernel: Shaped[Array, "d f"],
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    split: int | None = None,
) -> Shaped[Array, "*batch f"]:
    """`jax.lax.dot_general` of a dense layer, to be handed to `nn.Dense`.

    On the CPU leading axes are merged first: the gradient of the kernel then contracts
    one axis instead of several, which XLA runs faster
    (benchmarks/dense.py). On a TPU merging would copy, since rows are padded to tiles.

    Args:
        split: of `gathered`.
    """
    kernel = gathered(kernel, split)
    options = dict(precision=precision, preferred_element_type=preferred_element_type)
    if target() != "cpu":
        return jax.lax.dot_general(x, kernel, dimension_numbers, **options)
    rows = x.reshape(-1, x.shape[-1])
    product = jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), **options)
    return product.reshape(*x.shape[:-1], kernel.shape[-1])
