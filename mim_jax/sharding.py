# SPDX-License-Identifier: Apache-2.0
"""Where arrays live: a mesh of devices, and the shard of each parameter by its path."""

import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mim_jax.kernels.base import ROWS
from mim_jax.schema import check_ranges, within

# The first pattern that matches a leaf's path gives its spec; a leaf that matches none
# is replicated. Specs are written for a single block: a stacked leaf gets a leading
# None. Optimiser moments repeat the paths of the parameters, so the same rules apply.
# The "tensor" axis splits blocks as Megatron-LM does, arXiv:1909.08053, section 3: the
# first matrix by columns and the second by rows, so that one sum joins the parts.
RULES = (
    (r"/(qkv|fc1)/kernel$", PartitionSpec(None, ("tensor", "fsdp"))),
    (r"/(qkv|fc1)/bias$", PartitionSpec(("tensor", "fsdp"))),
    (r"/(out|fc2)/kernel$", PartitionSpec(("tensor", "fsdp"), None)),
    (r"/embed/kernel$", PartitionSpec(None, "fsdp")),
    (r"/predict/kernel$", PartitionSpec("fsdp", None)),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """Shape of the device mesh; batches are split over `data` and `fsdp`.

    Attributes:
        data: number of copies of the parameters; -1: number of devices divided by
            fsdp * tensor.
        fsdp: number of devices that share one copy of parameters and optimiser state.
        tensor: number of devices that share the work on one image, each with a part of
            the heads and of the MLP. Use it if the activations of one image do not fit
            on a device; otherwise `fsdp` communicates less.
    """

    data: int = within(-1, least=-1, most=2**20)
    fsdp: int = within(1, least=1, most=2**20)
    tensor: int = within(1, least=1, most=2**20)

    def __post_init__(self):
        check_ranges(self)
        if self.data == 0:
            raise ValueError(
                "data=0: want at least 1, or -1 for all devices that the others leave"
            )

    def build(self, devices: list | None = None) -> jax.sharding.Mesh:
        """The mesh over all devices.

        Raises:
            ValueError: data * fsdp * tensor is not the number of devices.
        """
        devices = jax.devices() if devices is None else devices
        shared = self.fsdp * self.tensor
        data = len(devices) // shared if self.data == -1 else self.data
        if data * shared != len(devices):
            raise ValueError(
                f"mesh data={self.data} x fsdp={self.fsdp} x tensor={self.tensor} on "
                f"{len(devices)} device(s): want data * fsdp * tensor = devices "
                "(data=-1 takes what the others leave)"
            )
        shape, names = (data, self.fsdp, self.tensor), (*ROWS, "tensor")
        kinds = (AxisType.Auto,) * len(names)
        if len(devices) == len(jax.devices()) and devices == jax.devices():
            return jax.make_mesh(shape, names, axis_types=kinds)
        grid = np.array(devices).reshape(shape)
        return jax.sharding.Mesh(grid, names, axis_types=kinds)


def path_name(path: tuple) -> str:
    """A pytree path as `encoder/block00/attn/qkv/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def by_path(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """A NamedSharding for every leaf of a tree of arrays or shapes."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(path_name(path), leaf, mesh)), tree
    )


def shardings_of(tree: Any) -> Any:
    """The sharding of every leaf of a tree of arrays or shapes."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def placed(shapes: Any, shardings: Any) -> Any:
    """A tree of shapes, each with its sharding."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        shapes,
        shardings,
    )


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """One copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_row(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Rows of a batch spread over the devices."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def row_parts(mesh: jax.sharding.Mesh) -> int:
    """Number of parts into which the mesh splits the rows of a batch."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def rows_here(mesh: jax.sharding.Mesh, rows: int) -> list[int]:
    """Sorted indices of the rows that this host's devices hold, of a global batch.

    On a TPU they need not be contiguous: JAX orders devices by how they are wired.

    Args:
        rows: number of rows of the global batch.
    """
    parts = by_row(mesh).addressable_devices_indices_map((rows,)).values()
    return sorted({row for part in parts if part for row in range(rows)[part[0]]})


def to_devices(batch: Any, mesh: jax.sharding.Mesh) -> Any:
    """The global batch on the devices, put together from each host's own rows."""
    rows = by_row(mesh)
    # With several hosts JAX treats this explicit transfer as implicit, and the guard of
    # the training loop would refuse it.
    with jax.transfer_guard_host_to_device("allow"):
        return jax.tree.map(
            lambda array: jax.make_array_from_process_local_data(rows, array), batch
        )


def everywhere(number: np.ndarray, mesh: jax.sharding.Mesh) -> jax.Array:
    """A number that all hosts have, on all devices."""
    with jax.transfer_guard_host_to_device("allow"):  # as in `to_devices`
        return jax.make_array_from_process_local_data(replicated(mesh), number)


def _spec(name: str, leaf, mesh: jax.sharding.Mesh) -> PartitionSpec:
    for pattern, spec in RULES:
        if re.search(pattern, "/" + name):
            stacked = "/blocks/" in name
            spec = PartitionSpec(None, *spec) if stacked else spec
            if len(spec) != len(leaf.shape):
                break
            sizes = [math.prod(mesh.shape[a] for a in _axes(part)) for part in spec]
            if all(
                side % size == 0 for side, size in zip(leaf.shape, sizes, strict=True)
            ):
                return spec
            break
    return PartitionSpec()


def _axes(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else part or ()


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """Bytes that the leaves of a tree take on one device."""
    sizes = jax.tree.map(
        lambda leaf, sharding: (
            math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        ),
        tree,
        shardings,
    )
    return sum(jax.tree.leaves(sizes))
