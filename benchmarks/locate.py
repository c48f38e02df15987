# SPDX-License-Identifier: Apache-2.0
"""Time of finding c for many masks on one large tree.

    python benchmarks/locate.py [--levels=10] [--masks=1000]

makes the quadtree over 2**levels x 2**levels pixels, draws masks that hide a pixel with
probability 1/2, and times `Tree.level_counts` in both readings.
"""

import argparse
import time

import numpy as np

from mim_jax.theory.trees import READINGS, Tree, mean_levels


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--levels", type=int, default=10)
    parser.add_argument("--masks", type=int, default=1000)
    given = parser.parse_args()
    start = time.perf_counter()
    tree = Tree.quadtree(given.levels)
    pixels = len(tree.leaves)
    tree.level_counts(np.zeros((1, pixels), bool))  # keeps the order of its nodes
    print(f"{time.perf_counter() - start:6.2f} s  tree of {len(tree.parents):,} nodes")
    start = time.perf_counter()
    draws = np.random.default_rng(0).integers(
        0, 256, (given.masks, -(-pixels // 8)), np.uint8
    )
    hidden = np.unpackbits(draws, axis=1, count=pixels).view(bool)
    print(f"{time.perf_counter() - start:6.2f} s  {given.masks:,} masks")
    for reading in READINGS:
        start = time.perf_counter()
        counts = tree.level_counts(hidden, reading)
        seconds = time.perf_counter() - start
        level = mean_levels(counts)[0].mean()
        print(f"{seconds:6.2f} s  {reading}: mean level of c {level:.3f}")


if __name__ == "__main__":
    main()
