# SPDX-License-Identifier: Apache-2.0
"""Dense layers with leading axes merged or not: training-step time on this machine.

python benchmarks/dense.py

The whole training step of configs/mae.py:photos, compiled both ways, interleaved in one
run. Prints one JSON line with medians in milliseconds and the ratio of medians.
"""

import dataclasses
import json
import pathlib
import platform
import statistics
import time

import jax
import numpy as np

from mim_jax import config, train
from mim_jax.plan import Plan

ROUNDS = 30
CONFIG = pathlib.Path(__file__).parent.parent / "configs/mae.py"


def with_rows(plan: Plan, merged: bool) -> Plan:
    """The plan with `merge_rows` of its encoder and decoder set."""
    networks = {}
    for name in ("encoder", "decoder"):
        network = getattr(plan.objective, name)
        kernels = dataclasses.replace(network.kernels, merge_rows=merged)
        networks[name] = network.clone(kernels=kernels)
    objective = dataclasses.replace(plan.objective, **networks)
    return dataclasses.replace(plan, objective=objective)


def main() -> None:
    plan = Plan.of(config.read(f"{CONFIG}:photos"))
    steps = {
        name: train.lowered(with_rows(plan, merged)).compile()
        for name, merged in {"merged": True, "plain": False}.items()
    }
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
