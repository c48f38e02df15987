# SPDX-License-Identifier: Apache-2.0
"""The masks that a run draws when it goes on, on some numbers of devices: for
hosts_test.py.

    python tests/elastic.py RUN OUT COUNT...

restores the run's newest checkpoint on the first COUNT devices of all processes, and
writes the masks of the next steps to OUT/PROCESSESxCOUNT.npz.
"""

import dataclasses
import os
import pathlib
import sys

import jax
import numpy as np

from mim_jax import config, main, sharding, train
from mim_jax.data.pipeline import train_batches
from mim_jax.maskings.block import Block
from mim_jax.maskings.grid import GridMasking
from mim_jax.maskings.random import Random
from mim_jax.plan import Plan
from mim_jax.run.checkpoint import Checkpointer

STEPS = 3
MASKINGS = {"random": Random(), "block": Block(least=2), "grid": GridMasking()}


def masks(run: pathlib.Path, devices: list) -> dict[str, np.ndarray]:
    """{masking, step and field: bits}, of the global batch."""
    plan = Plan.of(config.load(run / "config.json"), devices)
    settings, found = plan.settings, {}
    with Checkpointer(run, settings.checkpoint) as checkpointer:
        restored = checkpointer.restore(plan.abstract_state())
    assert restored is not None
    start, state, _ = restored
    rows = sharding.rows_here(plan.mesh, settings.batch_size)
    whole = sharding.replicated(plan.mesh)
    with train_batches(
        settings.data,
        seed=settings.seed,
        batch_size=settings.batch_size,
        start=start,
        stop=start + STEPS,
        places=rows,
    ) as batches:
        for step, batch in enumerate(batches, start):
            images = sharding.to_devices({"image": np.array(batch["image"])}, plan.mesh)
            for name, masking in MASKINGS.items():
                objective = dataclasses.replace(plan.objective, masking=masking)

                def drawn(state, batch, objective=objective):
                    keys = train.example_keys(state, settings.batch_size)
                    return objective.mask(batch, keys, state)

                mask = jax.jit(drawn, out_shardings=whole)(state, images)
                for field, leaf in zip(mask._fields, mask, strict=True):
                    bits = np.asarray(leaf.addressable_data(0))
                    found[f"{name} {step} {field}"] = bits
            state = dataclasses.replace(state, step=state.step + 1)
    return found


if __name__ == "__main__":
    run, out, *counts = sys.argv[1:]
    if "JAX_NUM_PROCESSES" in os.environ:
        main._join()
    for count in map(int, counts):
        found = masks(pathlib.Path(run), jax.devices()[:count])
        if jax.process_index() == 0:
            np.savez(pathlib.Path(out) / f"{jax.process_count()}x{count}.npz", **found)
