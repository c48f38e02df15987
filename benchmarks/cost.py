# SPDX-License-Identifier: Apache-2.0
"""How the cost of a training step grows: with batch, mask ratio, resolution and depth.

python benchmarks/cost.py
python benchmarks/cost.py --topology=v5e:1x1     # by the TPU compiler: '.[tpu]'

Steps of a small MAE on this machine, one leaf changed at a time, all taking turns; or
those of configs/mae.py as the compiler of a TPU that is not here accounts for them (see
docs/performance.md), an estimate. Beside each time stand the FLOPs of the algorithm;
below each table the power p of a fit time ~ x^p over what is changed (of the ratio,
over the patches that are seen), and that of the FLOPs, which it would be if time were
FLOPs and nothing else.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import statistics
import sys
import time

if any("--topology" in word for word in sys.argv):
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["TPU_ACCELERATOR_TYPE"] = "v5litepod-4"
    os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import jax  # noqa: E402
import numpy as np  # noqa: E402

from mim_jax import config, train  # noqa: E402
from mim_jax.aot import step as aot  # noqa: E402
from mim_jax.plan import Plan

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "mae.py"
BASE = {
    "batch_size": 16,
    "data.image_size": (128, 128),
    "objective.color_jitter": "none",
    "objective.masking.unit": 8,
    "objective.masking.ratio": 0.75,
    "objective.encoder.patch": 8,
    "objective.encoder.width": 256,
    "objective.encoder.depth": 6,
    "objective.encoder.heads": 4,
    "objective.decoder.width": 128,
    "objective.decoder.depth": 2,
    "objective.decoder.heads": 4,
}
# What is changed: (leaf, values, what the power is taken over).
STUDIES = {
    "batch": ("batch_size", lambda x: x),
    "ratio": ("objective.masking.ratio", lambda x: 1 - x),
    "resolution": ("data.image_size", lambda x: x),
    "depth": ("objective.encoder.depth", lambda x: x),
}
HERE = {
    "batch": [4, 8, 16, 32],
    "ratio": [0.25, 0.5, 0.75, 0.9],
    "resolution": [64, 96, 128, 192],
    "depth": [3, 6, 12, 24],
}
SCANNED = {
    "scan": True,
    "remat": "dots",
    "batch_size": 128,
    "objective.masking.ratio": 0.75,
    "data.image_size": (224, 224),
    "objective.encoder.depth": 12,
}
# Of configs/mae.py; the batch is that of one device.
THERE = {
    "batch": [32, 64, 128, 256],
    "ratio": [0.25, 0.5, 0.75, 0.9],
    "resolution": [128, 192, 224, 320],
    "depth": [6, 12, 24, 48],
}


class Measured:
    """A compiled step with its state, on this machine."""

    def __init__(self, leaves: dict):
        tree = config.read(f"{CONFIG}:photos")
        tree.update_from_flattened_dict(BASE | leaves)
        plan = Plan.of(tree)
        self._step, self._state = train.lowered(plan).compile(), jax.jit(plan.create)()
        settings = plan.settings
        shape = settings.data.image_shape
        images = (settings.batch_size, *shape)
        drawn = np.random.default_rng(0).integers(0, 256, images, np.uint8)
        self._batch = {"image": drawn}
        self.flops = settings.batch_size * settings.objective.flops(shape)
        self.times: list[float] = []

    def run(self) -> None:
        """One step, timed."""
        before = time.perf_counter()
        self._state, _ = self._step(self._state, self._batch)
        jax.block_until_ready(self._state)
        self.times.append(1e3 * (time.perf_counter() - before))


@dataclasses.dataclass(frozen=True)
class Estimated:
    """A step compiled for one device of a TPU: milliseconds by its account, FLOPs of
    the algorithm, and bytes on the device at the peak."""

    times: tuple[float]
    flops: float
    bytes: int


@functools.cache
def estimated(topology: str, *leaves: tuple) -> Estimated:
    """The default of configs/mae.py, scanned: a deep model compiles as fast as any."""
    tree = config.read(str(CONFIG))
    tree.update_from_flattened_dict(dict(leaves))
    plan, _ = aot.plan_for(tree, topology)
    sizes, text = aot.compile_step(plan)
    found = aot.estimate(plan, topology, text)
    account = found["estimate"]
    return Estimated(
        times=(1e3 * (account["priced"] + account["unpriced"]),),
        flops=plan.settings.batch_size * found["flops_per_image"],
        bytes=sizes["peak_bytes"],
    )


def power(x: list[float], y: list[float]) -> float:
    """p of the fit y ~ x^p."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--topology", default="", help="of one device: v5e:1x1")
    args = parser.parse_args()
    for study, (leaf, over) in STUDIES.items():
        values = (THERE if args.topology else HERE)[study]
        square = leaf == "data.image_size"
        changes = [{leaf: (x, x) if square else x} for x in values]
        if args.topology:
            cases = [
                estimated(args.topology, *(SCANNED | change).items())
                for change in changes
            ]
        else:
            cases = [Measured(change) for change in changes]
            for _ in range(args.rounds + 1):  # the first is left out
                for case in cases:
                    case.run()
        times = [statistics.median(case.times[-args.rounds :]) for case in cases]
        flops = [case.flops / 1e9 for case in cases]
        print(f"\n| {study} | ms | GFLOP | GFLOP/s |\n|---|---|---|---|")
        for value, ms, work in zip(values, times, flops, strict=True):
            print(f"| {value} | {ms:.0f} | {work:.1f} | {1e3 * work / ms:.0f} |")
        x = [over(value) for value in values]
        print(
            f"\npower of the time {power(x, times):.2f}, of the FLOPs "
            f"{power(x, flops):.2f}"
        )
        sizes = [it.bytes / 2**30 for it in cases if isinstance(it, Estimated)]
        if sizes:
            shown = ", ".join(f"{size:.2f}" for size in sizes)
            print(f"GiB {shown}; their power {power(x, sizes):.2f}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
