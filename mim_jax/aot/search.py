# SPDX-License-Identifier: Apache-2.0
"""Variants of a config, compiled one after the other and ranked."""

import itertools
import time
from typing import Any

from mim_jax import config as configs
from mim_jax.aot.devices import devices_of, usable_memory
from mim_jax.aot.lines import tried_line
from mim_jax.aot.step import compile_step, estimate, plan_for, verdict


def variants(config: configs.Tree, devices: int) -> list[dict[str, Any]]:
    """Leaves to try: the form of the blocks and what the backward pass keeps of them,
    the mesh, the batch."""
    batch = config.batch_size
    sizes = [(batch, 1), (2 * batch, 1), (batch // 2, 1), (batch, 2)]
    meshes = [1, *([devices] if devices > 1 else [])]
    # Scanned blocks that keep all have more to keep than fits; fastest guess first.
    forms = [(False, "none"), (True, "dots"), (True, "full")]
    return [
        {
            "scan": scan,
            "remat": remat,
            "batch_size": rows,
            "accumulate": parts,
            "mesh.fsdp": fsdp,
        }
        for (rows, parts), fsdp, (scan, remat) in itertools.product(
            sizes, meshes, forms
        )
    ]


def search(config: configs.Tree, topology: str, minutes: float) -> list[dict[str, Any]]:
    """Compile variants of a config until the time is up; the fastest that fits first.

    Returns:
        For each, `leaves`, and what `compile_step`, `verdict` and `estimate` say.
    """
    began, tried = time.monotonic(), []
    for leaves in variants(config, len(devices_of(topology))):
        if time.monotonic() - began > 60 * minutes:
            break
        tree = config.copy_and_resolve_references()
        for path, value in leaves.items():
            tree.update_from_flattened_dict({path: value})
        try:
            plan, _ = plan_for(tree, topology)
        except configs.ConfigError:
            continue  # a batch that the mesh does not divide, a loss of whole batches
        found, text = compile_step(plan)
        found |= {"leaves": leaves, "hbm_bytes": usable_memory(plan.mesh)}
        found |= verdict(found)
        if text:
            found |= estimate(plan, topology, text)
        tried.append(found)
        print(tried_line(found), flush=True)

    def rank(found):
        rates = found.get("estimate", {}).get("images_per_second", {})
        return (not found["fits"], -rates.get("with_unpriced", 0.0))

    return sorted(tried, key=rank)
