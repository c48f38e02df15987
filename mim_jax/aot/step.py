# SPDX-License-Identifier: Apache-2.0
"""Plans, compiles and prices a training step for devices this machine lacks."""

import dataclasses
import math
import time
from typing import Any

import jax

import mim_jax
from mim_jax import config as configs
from mim_jax import sharding
from mim_jax.aot import hlo
from mim_jax.aot.devices import (
    compiler_options,
    devices_of,
    over_memory,
    speed_of,
    usable_memory,
)
from mim_jax.data.sources.base import Source
from mim_jax.plan import Plan, for_devices
from mim_jax.run.warmstart import adopt, counted
from mim_jax.train import lowered


def plan_for(config: configs.Tree, topology: str) -> tuple[Plan, str]:
    """The plan of a run on the devices of a topology, and a note on its source.

    Raises:
        ConfigError: as `plan_on`; or the topology is unknown, or the job not "train".
    """
    if config.job != "train":
        raise configs.ConfigError(
            f"config.job={config.job!r}: want a training config, e.g. configs/mae.py"
        )
    return plan_on(config, devices_of(topology))


def plan_on(config: configs.Tree, devices: list) -> tuple[Plan, str]:
    """The plan of a run whose data may be absent, and where its images come from.

    Where the data are absent, photographs of the same size take their place: the
    compiled step depends on the shape of a batch alone.

    Raises:
        ConfigError: the config cannot work on those devices.
    """
    config = adopt(config)
    wanted = config.data.source.name
    try:
        return Plan.of(counted(config), devices), wanted
    except configs.ConfigError as error:
        if not isinstance(error.__cause__, OSError):
            raise
    config = config.copy_and_resolve_references()
    with config.data.unlocked():
        config.data.source = configs.choose(Source, "photos")
    plan = Plan.of(config, devices, stand_in=True)
    return plan, f"photos: the data of {wanted} are not here"


def facts(plan: Plan) -> dict[str, Any]:
    """What is known of a plan before compilation; bytes are per device."""
    settings, state = plan.settings, plan.abstract_state()
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    return {
        "versions": {"mim_jax": mim_jax.__version__, "jax": jax.__version__},
        "objective": type(settings.objective).__name__,
        "devices": plan.mesh.size,
        "mesh": dict(plan.mesh.shape),
        "image_shape": list(settings.data.image_shape),
        "batch_size": settings.batch_size,
        "batch_per_device": settings.batch_size // sharding.row_parts(plan.mesh),
        "micro_batches": settings.accumulate,
        "coupled": settings.objective.batch_coupled,
        "forms": plan.forms,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "state_bytes": sharding.bytes_per_device(state, placed),
        "hbm_bytes": usable_memory(plan.mesh),
    }


def compile_step(plan: Plan) -> tuple[dict[str, Any], str]:
    """Compile the step, to learn whether it fits and how much memory it needs.

    Returns:
        Values, and the program's text ("" if there is none). Values are per device:
        `compiles`; `compile_seconds`; `note`, a line that says what was compiled in
        place of the plan's own step ("" if nothing was); `peak_bytes`, which an error
        of the compiler gives to two decimals of its unit only; and, if the step
        compiles, `argument_bytes`, `output_bytes`, `alias_bytes` (the part of the
        output that reuses the memory of donated arguments) and `temp_bytes`.
    """
    traced, note = _lowered_without_devices(plan)
    started, text = time.monotonic(), ""
    try:
        compiled = traced.compile(compiler_options(plan.mesh))
        found = sizes(compiled)
    except jax.errors.JaxRuntimeError as error:
        peak, _ = over_memory(error)
        found = {"compiles": False, "peak_bytes": peak}
    else:
        text = compiled.as_text() or ""
    seconds = time.monotonic() - started
    return found | {"compile_seconds": seconds, "note": note}, text


def sizes(compiled: jax.stages.Compiled) -> dict[str, Any]:
    """What a compiled step says of its memory: values of `compile_step`."""
    memory: Any = compiled.memory_analysis()
    return {
        "compiles": True,
        "peak_bytes": memory.peak_memory_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
    }


def _lowered_without_devices(plan: Plan) -> tuple[jax.stages.Lowered, str]:
    """The traced step, and a note if it has plain attention for want of cuDNN.

    JAX asks cuDNN for its version when it traces. That needs cuDNN's library, which
    comes with JAX's plug-in for CUDA, and no GPU.
    """
    try:
        return lowered(plan), ""
    except RuntimeError as error:
        if "cuDNN" not in str(error):
            raise
        reason = str(error).splitlines()[0]
    settings = dataclasses.replace(plan.settings, attention="plain")
    shape, total = settings.data.image_shape, plan.total
    plain = for_devices(settings.objective, "plain", shape, plan.mesh).for_run(total)
    plan = dataclasses.replace(plan, settings=settings, objective=plain)
    return lowered(plan), f"priced with plain attention: {reason}"


def verdict(found: dict[str, Any]) -> dict[str, Any]:
    """Whether the step fits: `held_bytes`, with the gaps between buffers, must fit.

    The compiler checks only the peak: the bytes alive at one time. The layout of
    buffers in memory leaves gaps; with loops (scan), `temp_bytes` was once 1.6 times
    the peak. So a step that compiles may still be too large.
    """
    held = found["peak_bytes"]
    if found["compiles"]:
        held = found["argument_bytes"] + found["output_bytes"] + found["temp_bytes"]
        held = max(held - found["alias_bytes"], found["peak_bytes"])
    return {"held_bytes": held, "fits": held <= found["hbm_bytes"]}


def estimate(plan: Plan, topology: str, text: str) -> dict[str, Any]:
    """The cost of a compiled step on one device, by the compiler's own account.

    Returns:
        `collectives`: {kind: {count, bytes}} of a step.
        `flops_per_image`: FLOPs of the algorithm, without recomputation.
        `roofline_seconds`: time of a step at the device's full FLOP/s.
        `estimate`, only if the chip's clock is known: the result of `hlo.account`, with
        `images_per_second` and `utilisation` (the share of the device's FLOP/s that the
        algorithm uses at that rate). Both have two entries: "priced" counts only the
        time of priced instructions, "with_unpriced" adds the lower bound for the
        others, except those that run meanwhile. For a GPU nothing is priced, so that
        its rates are upper bounds.
    """
    settings = plan.settings
    speed = speed_of(topology)
    flops = settings.objective.flops(settings.data.image_shape)
    rows = settings.batch_size / plan.mesh.size
    found: dict[str, Any] = {
        "collectives": hlo.collectives(text),
        "flops_per_image": flops,
        "roofline_seconds": flops * rows / speed.flops,
    }
    if math.isnan(speed.clock):
        return found
    account = hlo.account(text, speed, plan.mesh.size)
    seconds = {
        "priced": account["priced"],
        "with_unpriced": account["priced"] + account["unpriced"],
    }
    rates = {name: rows / value for name, value in seconds.items() if value}
    account["images_per_second"] = rates
    account["utilisation"] = {
        k: rate * flops / speed.flops for k, rate in rates.items()
    }
    return found | {"estimate": account}
