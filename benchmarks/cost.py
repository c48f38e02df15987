# SPDX-License-Identifier: Apache-2.0
"""How the cost of a training step grows: with batch, mask ratio, resolution and depth.

python benchmarks/cost.py

Steps of a small MAE on this machine, one leaf changed at a time, all taking turns.
Beside each time stand the FLOPs of the algorithm; below each table the power p of a fit
time ~ x^p over what is changed (of the ratio, over the patches that are seen), and that
of the FLOPs, which it would be if time were FLOPs and nothing else.
"""

import argparse
import pathlib
import statistics
import time

import jax
import numpy as np

from mim_jax import config, train

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
    "batch": ("batch_size", [4, 8, 16, 32], lambda x: x),
    "ratio": ("objective.masking.ratio", [0.25, 0.5, 0.75, 0.9], lambda x: 1 - x),
    "resolution": ("data.image_size", [64, 96, 128, 192], lambda x: x),
    "depth": ("objective.encoder.depth", [3, 6, 12, 24], lambda x: x),
}


class Case:
    """A compiled step with its state."""

    def __init__(self, leaves: dict):
        tree = config.read(f"{CONFIG}:photos")
        tree.update_from_flattened_dict(BASE | leaves)
        plan = train.Plan.of(tree)
        self._step, self._state = plan.lowered().compile(), jax.jit(plan.create)()
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


def power(x: list[float], y: list[float]) -> float:
    """p of the fit y ~ x^p."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    for study, (leaf, values, over) in STUDIES.items():
        square = leaf == "data.image_size"
        cases = [Case({leaf: (x, x) if square else x}) for x in values]
        for _ in range(args.rounds + 1):  # the first is left out
            for case in cases:
                case.run()
        times = [statistics.median(case.times[1:]) for case in cases]
        flops = [case.flops / 1e9 for case in cases]
        print(f"\n| {study} | ms | GFLOP | GFLOP/s |\n|---|---|---|---|")
        for value, ms, work in zip(values, times, flops, strict=True):
            print(f"| {value} | {ms:.0f} | {work:.1f} | {1e3 * work / ms:.0f} |")
        x = [over(value) for value in values]
        print(
            f"\npower of the time {power(x, times):.2f}, of the FLOPs "
            f"{power(x, flops):.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
