# SPDX-License-Identifier: Apache-2.0
"""Batched SSIM and FSIM against scikit-image and piq on the same images.

python benchmarks/similarity.py --batch=16 --rounds=9

Needs piq and torch (the extra `oracle`). Implementations take turns on crops of 224 x
224 pixels from the embedded photographs; prints one JSON line per measure with the
median time per pair of images of each, in milliseconds by the clock and of the
processor (all cores together, which other work on the machine disturbs less), their
ratios, and the largest difference of the values. piq gets the whole batch and every
core; ours gets the batch, and takes pair after pair on one core, as scikit-image does.
Compiling is not counted.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import piq
import skimage
import torch
from skimage import data
from skimage.metrics import structural_similarity

from mim_jax.ops import similarity


def pairs(batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Crops and noisy versions of them, float32 in 0..1."""
    rng = np.random.default_rng(0)
    photographs = [data.chelsea(), data.coffee(), data.astronaut()]
    crops = []
    for i in range(batch):
        image = photographs[i % len(photographs)]
        row, col = (rng.integers(0, side - 223) for side in image.shape[:2])
        crops.append(image[row : row + 224, col : col + 224] / 255)
    images = np.stack(crops).astype(np.float32)
    noise = rng.normal(0, 0.05, images.shape).astype(np.float32)
    return images, np.clip(images + noise, 0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    images, other = pairs(arguments.batch)
    arrays = jnp.asarray(images), jnp.asarray(other)
    tensors = [torch.tensor(np.moveaxis(x, -1, 1)) for x in (images, other)]

    def ours(function, **options):
        jitted = jax.jit(functools.partial(function, **options))
        return lambda: np.asarray(jitted(*arrays))

    def scikit_image():
        return [
            structural_similarity(
                a,
                b,
                data_range=1.0,
                channel_axis=-1,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
            )
            for a, b in zip(images, other, strict=True)
        ]

    def by_piq(chromatic):
        return lambda: piq.fsim(*tensors, chromatic=chromatic, reduction="none").numpy()

    rivals = {
        "ssim": (ours(similarity.ssim), scikit_image),
        "fsim": (ours(similarity.fsim), by_piq(False)),
        "fsimc": (ours(similarity.fsim, chromatic=True), by_piq(True)),
    }
    for name, functions in rivals.items():
        values = [np.asarray(function()) for function in functions]  # compiles
        clocks = {"": time.perf_counter, "cpu_": time.process_time}
        times = [{name: [] for name in clocks} for _ in functions]
        for _ in range(arguments.rounds):
            for function, spent in zip(functions, times, strict=True):
                start = {kind: clock() for kind, clock in clocks.items()}
                function()
                for kind, clock in clocks.items():
                    spent[kind].append(clock() - start[kind])
        found: dict[str, Any] = {"measure": name}
        for kind in clocks:
            mine, theirs = (
                1000 * statistics.median(spent[kind]) / arguments.batch
                for spent in times
            )
            found |= {
                f"{kind}ours_ms": round(mine, 3),
                f"{kind}theirs_ms": round(theirs, 3),
                f"{kind}ratio": round(theirs / mine, 2),
            }
        found |= {
            "largest_difference": float(np.abs(values[0] - values[1]).max()),
            "batch": arguments.batch,
            "rounds": arguments.rounds,
            "versions": {
                package.__name__: package.__version__
                for package in (jax, skimage, piq, torch)
            },
            "machine": f"{cores} cores, {platform.machine()}",
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
