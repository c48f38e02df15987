# SPDX-License-Identifier: Apache-2.0
"""Compiles variants of a config one after the other, and ranks them."""

import itertools
import time
from typing import Any

from mim_jax import config as configs
from mim_jax.aot.devices import devices_of, usable_memory
from mim_jax.aot.lines import tried_line
from mim_jax.aot.step import compile_step, estimate, plan_for, verdict


def variants(config: configs.Tree, devices: int) -> list[dict[str, Any]]:
    """Config leaves of each variant: scan and remat of the blocks, mesh, and batch."""
    batch = config.batch_size
    sizes = [(batch, 1), (2 * batch, 1), (batch // 2, 1), (batch, 2)]
    meshes = [1, *([devices] if devices > 1 else [])]
    # Scan without remat is not tried: it saves more than fits. The variant that is
    # probably fastest comes first.
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
    """Compile variants of a config until the time is up.

    Returns:
        For each variant its `leaves` and the values that `compile_step`, `verdict` and
        `estimate` return. Variants that fit come first, the fastest by estimate before
        the others.
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
            continue  # e.g. the mesh does not divide the batch, or the loss couples it
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
