# SPDX-License-Identifier: Apache-2.0
"""Descriptions of TPUs and GPUs to compile for, and their published speeds."""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from mim_jax import sharding
from mim_jax.aot.hlo import Speed
from mim_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Tpu:
    """A TPU chip, as libtpu names it.

    Attributes:
        name: libtpu's name of the chip.
        cores: libtpu's name for the use of its cores; in a "megacore", two cores are
            one device.
        sides: number of sides of a layout: 2 for 2x4, 3 for 2x2x2.
        speed: published speed of one device. `wires` is half of the published sum of
            both directions. `clock` follows from the size of the matrix units; it is
            NaN where two cores share the work, since it is unknown how the compiler
            then counts cycles.
    """

    name: str
    cores: str
    sides: int
    speed: Speed


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU, with what XLA's compiler needs to know of it.

    Attributes:
        name: the driver's name of the device.
        capability: CUDA compute capability, major and minor.
        memory: bytes of device memory.
        multiprocessors: number of multiprocessors.
        lanes: float32 units of each multiprocessor.
        l2: bytes of the level-2 cache.
        shared: bytes of each multiprocessor's shared memory.
        speed: published speed of one device; `wires` is NVLink in one direction.
        network: bytes per second from one device to other hosts, in NVIDIA's own hosts
            of eight GPUs.
    """

    name: str
    capability: tuple[int, int]
    memory: int
    multiprocessors: int
    lanes: int
    l2: int
    shared: int
    speed: Speed
    network: float


_NAN = math.nan
TPUS = {
    "v4": Tpu("v4", "megacore", 3, Speed(275e12, 1200e9, 150e9, _NAN)),
    "v5e": Tpu("v5e", "default", 2, Speed(197e12, 819e9, 100e9, 1.5e9)),
    "v5p": Tpu("v5", "megacore", 3, Speed(459e12, 2765e9, 300e9, _NAN)),
    "v6e": Tpu("v6e", "default", 2, Speed(918e12, 1638e9, 224e9, 1.75e9)),
    "tpu7x": Tpu("tpu7x", "default", 3, Speed(1153.5e12, 3685e9, 300e9, _NAN)),
}
_A100: dict[str, Any] = dict(
    capability=(8, 0), multiprocessors=108, lanes=64, network=25e9
)
_A100 |= dict(l2=40 * 2**20, shared=164 * 2**10)
_H100: dict[str, Any] = dict(
    capability=(9, 0), multiprocessors=132, lanes=128, network=50e9
)
_H100 |= dict(l2=50 * 2**20, shared=228 * 2**10)
GPUS = {
    "a100-40": Gpu(
        name="NVIDIA A100-SXM4-40GB",
        memory=42331013120,
        speed=Speed(312e12, 1555e9, 300e9, 1.41e9),
        **_A100,
    ),
    "a100-80": Gpu(
        name="NVIDIA A100-SXM4-80GB",
        memory=85100068864,
        speed=Speed(312e12, 2039e9, 300e9, 1.41e9),
        **_A100,
    ),
    "h100": Gpu(
        name="NVIDIA H100 80GB HBM3",
        memory=84942979072,
        speed=Speed(989e12, 3352e9, 450e9, 1.98e9),
        **_H100,
    ),
    "h200": Gpu(
        name="NVIDIA H200",
        memory=151397597184,
        speed=Speed(989e12, 4800e9, 450e9, 1.98e9),
        **_H100,
    ),
}
CHIPS = ", ".join([*TPUS, *GPUS])
# Share of a GPU's memory that JAX reserves by default, XLA_PYTHON_CLIENT_MEM_FRACTION.
_TAKEN = 0.75


def devices_of(topology: str) -> list:
    """Stand-ins, to compile for, of the devices of a topology.

    Args:
        topology: a TPU chip and the layout of the chips, "v5e:2x4" or "v4:2x2x2"; or a
            GPU and the number of GPUs in one host, "h100:8", or the number of hosts and
            of GPUs in each, "h100:4x8".
    Raises:
        ConfigError: the chip or its layout is unknown, or its compiler not installed.
    """
    chip, _, layout = topology.partition(":")
    sides = layout.split("x")
    if chip not in TPUS and chip not in GPUS:
        raise ConfigError(
            f"topology={topology!r}: want CHIP:LAYOUT, e.g. --topology=v5e:2x4, "
            f"v4:2x2x2 or h100:8; chips: {CHIPS}"
        )
    numbers = all(re.fullmatch(r"[1-9]\d*", side) for side in sides)
    if chip in GPUS:
        if not numbers or len(sides) > 2:
            raise ConfigError(
                f"topology={topology!r}: want the number of GPUs in one host, e.g. "
                f"{chip}:8, or of hosts and of GPUs in each, e.g. {chip}:4x8"
            )
        return _gpus(GPUS[chip], *map(int, ["1", *sides][-2:]))
    want = TPUS[chip].sides
    if not numbers or len(sides) != want:
        example = "x".join("224"[-want:])
        raise ConfigError(
            f"topology={topology!r}: want {want} sides, e.g. {chip}:{example}"
        )
    return _tpus(TPUS[chip], topology)


def _tpus(chip: Tpu, topology: str) -> list:
    installed = importlib.util.find_spec("libtpu") is not None
    if not installed and "TPU_LIBRARY_PATH" not in os.environ:
        raise ConfigError(
            "the compiler for TPUs is not installed: want pip install -e '.[tpu]'"
        )
    layout = topology.partition(":")[2]
    rows, cols = map(int, layout.split("x")[:2])
    try:
        found = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{chip.name}:{layout}",
            chip_config_name=chip.cores,
            chips_per_host_bounds=(min(rows, 2), min(cols, 2), 1),
            num_slices=1,
        )
    except RuntimeError as error:
        line = str(error).splitlines()[0]
        raise ConfigError(f"topology={topology!r}: {line}") from error
    return list(found.devices)


def _gpus(chip: Gpu, hosts: int, each: int) -> list:
    try:
        found = topologies.get_topology_desc(
            platform="cuda",
            topology=f"1x{hosts}x{each}",
            target_config=_description(chip),
        )
    except (NotImplementedError, ImportError) as error:
        raise ConfigError(
            "the compiler for GPUs is not installed: want pip install -e '.[cuda]' "
            "(Linux)"
        ) from error
    return list(found.devices)


def _description(chip: Gpu) -> str:
    """The GPU as XLA's GpuTargetConfigProto, in text form."""
    major, minor = chip.capability
    return f"""
        platform_name: "CUDA"
        device_description_str: "{chip.name}"
        dnn_version_info {{ major: 9 minor: 10 }}
        runtime_version {{ major: 12 minor: 9 }}
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          core_count: {chip.multiprocessors}
          fpus_per_core: {chip.lanes}
          clock_rate_ghz: {chip.speed.clock / 1e9}
          memory_bandwidth: {chip.speed.hbm:.0f}
          device_memory_size: {chip.memory}
          l2_cache_size: {chip.l2}
          shared_memory_per_core: {chip.shared}
          shared_memory_per_block: 49152
          shared_memory_per_block_optin: {chip.shared - 1024}
          threads_per_warp: 32
          threads_per_block_limit: 1024
          threads_per_core_limit: 2048
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
        }}"""


def speed_of(topology: str) -> Speed:
    """The speed of one device of a topology that `devices_of` accepts."""
    chip, _, layout = topology.partition(":")
    if chip in TPUS:
        return TPUS[chip].speed
    gpu = GPUS[chip]
    alone = "x" not in layout or layout.startswith("1x")
    return gpu.speed if alone else dataclasses.replace(gpu.speed, wires=gpu.network)


def gpu_named(kind: str) -> Gpu | None:
    """The row of GPUS whose name JAX gives as the kind of a device, if there is one."""
    return next((gpu for gpu in GPUS.values() if gpu.name == kind), None)


def compiler_options(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Compiler options that are necessary because the devices are not present."""
    if mesh.devices.flat[0].platform == "gpu":
        return {"xla_gpu_autotune_level": 0}  # autotuning runs kernels on the device
    return {}


def usable_memory(mesh: jax.sharding.Mesh) -> int:
    """Bytes that a program may use on one device of a mesh of `devices_of`."""
    gpu = gpu_named(mesh.devices.flat[0].device_kind)
    if gpu is not None:
        return int(_TAKEN * gpu.memory)
    # Only the TPU compiler knows, and its error for a program that is too large says
    # it: so compile one.
    shape, rows = (mesh.size, 2**40), sharding.by_row(mesh)
    too_much = jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=rows)
    try:
        jax.jit(jnp.invert).lower(too_much).compile()
    except jax.errors.JaxRuntimeError as error:
        return over_memory(error)[1]
    raise AssertionError("a program of a tebibyte fits")


def over_memory(error: Exception) -> tuple[int, int]:
    """(wanted, usable) bytes, read from the TPU compiler's out-of-memory error; any
    other error is raised again."""
    message = str(error)
    sizes = re.findall(r"\b(\d+(?:\.\d+)?)([KMGT])\b", message)
    exhausted = message.startswith("RESOURCE_EXHAUSTED") and "hbm" in message.lower()
    if not exhausted or len(sizes) < 2:  # e.g. another memory of the chip is full
        raise error
    wanted, usable = (
        round(float(number) * 1024 ** (" KMGT".index(unit)))
        for number, unit in sizes[:2]
    )
    return wanted, usable
