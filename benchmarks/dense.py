# SPDX-License-Identifier: Apache-2.0
"""Dense layers with leading axes merged or not: training-step time on this machine.

python benchmarks/dense.py

The whole training step of configs/mae.py:photos, compiled both ways, interleaved in one
run. Prints one JSON line with medians in milliseconds and the ratio of medians.
"""

import importlib.util
import json
import pathlib
import platform
import statistics
import time
from unittest import mock

import jax
import numpy as np

from mim_jax import train
from mim_jax.models import vit
from mim_jax.plan import Plan

ROUNDS = 30


def plain_dot(x, kernel, axes, split=None, **options):
    """`dense_dot` as it is on other backends."""
    return jax.lax.dot_general(x, kernel, axes, **options)


def main() -> None:
    path = pathlib.Path(__file__).parent.parent / "configs" / "mae.py"
    spec = importlib.util.spec_from_file_location("mae", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    plan = Plan.of(module.get_config("photos"))
    steps = {"merged": train.lowered(plan).compile()}
    with mock.patch.object(vit, "dense_dot", plain_dot):
        steps["plain"] = train.lowered(plan).compile()
    states = {name: jax.jit(plan.create)() for name in steps}
    shape = (plan.settings.batch_size, *plan.settings.data.image_shape)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    times = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            before = time.perf_counter()
            states[name], metrics = step(states[name], {"image": images})
            jax.block_until_ready(metrics)
            times[name].append(1e3 * (time.perf_counter() - before))
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(
        json.dumps(
            {
                "command": "python benchmarks/dense.py",
                "machine": f"{platform.machine()}, {jax.devices()[0].device_kind}",
                "jax": jax.__version__,
                "median_ms": medians,
                "plain_over_merged": medians["plain"] / medians["merged"],
            }
        )
    )


if __name__ == "__main__":
    main()
