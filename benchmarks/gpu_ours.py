# SPDX-License-Identifier: Apache-2.0
"""A side of benchmarks/gpu.py: our training step of a config."""

import functools
import pathlib
import time

import jax
import numpy as np
from gpu import Absent, serve

from mim_jax import config, sharding, train
from mim_jax.aot.devices import gpu_named
from mim_jax.aot.step import plan_on

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def build(config: str, leaves: dict, batch: int, steps: int, small: bool):
    """Facts of the step, and what runs a turn."""
    device = jax.devices()[0]
    if device.platform not in ("gpu", "cuda", "rocm") and not small:
        raise Absent("JAX sees no GPU: want pip install -e '.[cuda]', or --small")
    plan, _ = plan_on(tree_of(config, leaves | {"batch_size": batch}), [device])
    step = train.lowered(plan).compile()
    images = synthetic(plan)
    settings, gpu = plan.settings, gpu_named(device.device_kind)
    facts = {
        "device": device.device_kind,
        "forms": plan.forms,
        "versions": {"jax": jax.__version__},
        "flops_per_image": settings.objective.flops(settings.data.image_shape),
        "peak_flops": gpu.speed.flops if gpu else None,
    }
    state = jax.jit(plan.create)()
    return facts, functools.partial(turn, step, [state], images, device, steps)


def tree_of(name: str, leaves: dict):
    """A config with some leaves changed."""
    tree = config.read(str(CONFIGS / f"{name}.py"))
    changes = {key: tuple(x) if isinstance(x, list) else x for key, x in leaves.items()}
    tree.update_from_flattened_dict(changes)
    return tree


def synthetic(plan):
    """A batch of noise, on the device."""
    random = np.random.default_rng(0)
    drawn = {
        name: random.integers(0, 256, one.shape, np.uint8)
        for name, one in plan.abstract_batch().items()
    }
    return sharding.to_devices(drawn, plan.mesh)


def turn(step, held: list, batch, device, steps: int) -> dict:
    """A turn of so many steps, and one before that is not timed."""
    for number in range(steps + 1):
        if number == 1:
            jax.block_until_ready(held[0])
            before = time.perf_counter()
        held[0], _ = step(held[0], batch)
    jax.block_until_ready(held[0])
    seconds = time.perf_counter() - before
    memory = device.memory_stats() or {}
    return {"ms": 1e3 * seconds / steps, "peak_bytes": memory.get("peak_bytes_in_use")}


if __name__ == "__main__":
    serve(build)
