# SPDX-License-Identifier: Apache-2.0
"""Forms that the compiler cannot split over devices by itself, and shared weights."""

import functools
import math
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Shaped

from mim_jax.kernels.base import ROWS, Attend


def spread(
    run: Attend,
    qkv: Float[Array, "b n e"],
    bias: Float[Array, " e"],
    heads: int,
    mesh: jax.sharding.Mesh,
) -> Float[Array, "b n e//3"]:
    """A form of attention, run by each device on its own rows and heads.

    The compiler can split neither a kernel nor a loop over rows.

    Args:
        run: the form.
        mesh: its axes "data" and "fsdp" divide the rows, its axis "tensor" the heads.
    """
    over = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    parts, rows = mesh.shape["tensor"], PartitionSpec(ROWS)
    if parts == 1:
        each = functools.partial(run, heads=heads)
        return over(each, in_specs=(rows, PartitionSpec()), out_specs=rows)(qkv, bias)

    def local(qkv, bias):
        return run(qkv.reshape(*qkv.shape[:2], -1), bias.reshape(-1), heads // parts)

    # Each device gets some heads of the queries, of the keys and of the values. (A TPU
    # pads that axis of three.)
    whole = *qkv.shape[:2], 3, qkv.shape[2] // 3
    return over(
        local,
        in_specs=(
            PartitionSpec(ROWS, None, None, "tensor"),
            PartitionSpec(None, "tensor"),
        ),
        out_specs=PartitionSpec(ROWS, None, "tensor"),
    )(qkv.reshape(whole), bias.reshape(whole[2:]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gathered(
    kernel: Shaped[Array, "d f"], mesh: jax.sharding.Mesh, split: int | None = None
) -> Shaped[Array, "d f"]:
    """A weight matrix that `fsdp` devices share, whole on each of them.

    A block gathers it just before it uses it, and leaves its gradient in parts. Left to
    itself the compiler may send the activations instead, which are far larger.

    Args:
        mesh: of those devices.
        split: the axis of which `tensor` devices keep a part each, if any.
    """
    return _laid_out(kernel, mesh, split, ("tensor",))


def _laid_out(kernel, mesh, split: int | None, axes: tuple[str, ...]):
    if mesh.shape["fsdp"] == 1:
        return kernel
    spec: list[Any] = [None, None]
    if split is not None:
        spec[split] = axes
    rule = jax.sharding.NamedSharding(mesh, PartitionSpec(*spec))
    size = math.prod(mesh.shape[axis] for axis in axes)
    if split is not None and kernel.shape[split] % size:
        return kernel  # it is stored whole
    return jax.lax.with_sharding_constraint(kernel, rule)


gathered.defvjp(
    lambda kernel, mesh, split: (gathered(kernel, mesh, split), None),
    lambda mesh, split, _, gradient: (
        _laid_out(gradient, mesh, split, ("tensor", "fsdp")),
    ),
)
