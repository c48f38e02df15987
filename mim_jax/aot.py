# SPDX-License-Identifier: Apache-2.0
"""Compile the training step of any config for a TPU or GPU without having one.

python -m mim_jax.aot --config=configs/mae.py --topology=v5e:2x4

Says whether the step fits in the memory of those and what takes how much of it, what
the devices tell each other, and what the compiler estimates it to cost, part by part;
of a GPU, only what it would cost at least. Neither is a measurement (`mim_jax.hlo`).
With --search --minutes=M it compiles variants of the config, of remat, mesh and batch,
and says which fit and which of them is fastest by that estimate.

Exit codes: 0 it fits, 1 it does or may not, 2 the command cannot work.
"""

import os

if __name__ == "__main__":
    # JAX reads the first when it is imported: tracing needs the CPU only, and a GPU or
    # TPU of this machine stays free for others. libtpu reads the rest when it is
    # loaded; without them it looks for the machine that a TPU would be part of.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["TPU_ACCELERATOR_TYPE"] = "v5litepod-4"  # any: --topology decides
    os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no TPU is opened: none is locked

import itertools
import json
import math
import pathlib
import time
from typing import Any

import jax
from absl import app, flags

import mim_jax
from mim_jax import config as configs
from mim_jax import hlo, sharding
from mim_jax.commandline import CONFIG, EXIT_CONFIG, leave, parse
from mim_jax.data.sources.base import Source
from mim_jax.targets import (
    CHIPS,
    compiler_options,
    devices_of,
    over_memory,
    speed_of,
    usable_memory,
)
from mim_jax.train import Plan
from mim_jax.warmstart import adopt

EXIT_DOES_NOT_FIT = 1

# Not required by absl: that would hold for `main` too, where both are imported.
_TOPOLOGY = flags.DEFINE_string(
    "topology", "", f"CHIP:LAYOUT, e.g. v5e:2x4 or h100:8; chips: {CHIPS}"
)
_SEARCH = flags.DEFINE_bool("search", False, "Compile variants and rank them.")
_MINUTES = flags.DEFINE_float("minutes", 30.0, "Begin no variant after so many.")
_OUT = flags.DEFINE_string("out", "", "JSON file to write the result to, if any.")


def plan_for(config: configs.Tree, topology: str) -> tuple[Plan, str]:
    """The plan of a run on devices that are not here, and where its images come from.

    Where the data are not here either, photographs of the same size stand in: what is
    compiled depends on the shape of a batch alone.

    Raises:
        ConfigError: the config cannot work on those, or is of no training.
    """
    if config.job != "train":
        raise configs.ConfigError(
            f"config.job={config.job!r}: want a training config, e.g. configs/mae.py"
        )
    devices = devices_of(topology)
    config = adopt(config)
    wanted = config.data.source.name
    try:
        return Plan.of(config, devices), wanted
    except configs.ConfigError as error:
        if not isinstance(error.__cause__, OSError):
            raise
    config = config.copy_and_resolve_references()
    with config.data.unlocked():
        config.data.source = configs.choose(Source, "photos")
    plan = Plan.of(config, devices, stand_in=True)
    return plan, f"photos: the data of {wanted} are not here"


def facts(plan: Plan) -> dict[str, Any]:
    """What is known of a plan before it is compiled; bytes are those of one device."""
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
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "state_bytes": sharding.bytes_per_device(state, placed),
        "hbm_bytes": usable_memory(plan.mesh),
    }


def compile_step(plan: Plan) -> tuple[dict[str, Any], str]:
    """Compile the step: whether it fits, and what it takes on one device.

    Returns:
        `compiles`; `peak_bytes`, to two decimals of its unit if it does not; then also
        `argument_bytes`, `output_bytes`, `alias_bytes` (the part of the output that
        takes the place of donated arguments), `temp_bytes`; `compile_seconds`. And the
        program's text, "" if there is none.
    """
    lowered = plan.lowered()
    started, text = time.monotonic(), ""
    try:
        compiled = lowered.compile(compiler_options(plan.mesh))
        memory: Any = compiled.memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        peak, _ = over_memory(error)
        found = {"compiles": False, "peak_bytes": peak}
    else:
        text = compiled.as_text() or ""
        found = {
            "compiles": True,
            "peak_bytes": memory.peak_memory_in_bytes,
            "argument_bytes": memory.argument_size_in_bytes,
            "output_bytes": memory.output_size_in_bytes,
            "alias_bytes": memory.alias_size_in_bytes,
            "temp_bytes": memory.temp_size_in_bytes,
        }
    return found | {"compile_seconds": time.monotonic() - started}, text


def estimate(plan: Plan, topology: str, text: str) -> dict[str, Any]:
    """What a compiled step costs by the compiler's own account, on one device.

    Returns:
        `collectives`: {kind: {count, bytes}} of a step; `flops_per_image` of the
        algorithm, nothing being counted twice; `roofline_seconds`: of a step at the
        device's full speed; and, where the chip's clock is known, `estimate`: that of
        `hlo.account` with `images_per_second`, `utilisation` (share of the device's
        FLOP/s that the algorithm needs at that rate), each by priced instructions alone
        and with the bound of those that the device waits for ("with_unpriced"). Of a
        GPU nothing is priced: these rates are upper bounds.
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
        print(_tried(found), flush=True)

    def rank(found):
        rates = found.get("estimate", {}).get("images_per_second", {})
        return (not found["fits"], -rates.get("with_unpriced", 0.0))

    return sorted(tried, key=rank)


def _tried(found: dict[str, Any]) -> str:
    leaves = ", ".join(f"{name}={value}" for name, value in found["leaves"].items())
    held = f"{'fits' if found['fits'] else 'no room'}, {_gib(found['held_bytes'])}"
    rates = found.get("estimate", {}).get("images_per_second", {})
    rate = f", {rates['with_unpriced']:.0f} images/s by estimate" if rates else ""
    return f"{leaves}: {held}{rate}"


def _costs(found: dict[str, Any]) -> str:
    lines = []
    for kind, one in found["collectives"].items():
        size = one["bytes"] / 2**20
        lines.append(f"{kind:<11} {one['count']} x, {size:.1f} MiB per device and step")
    flops, roof = found["flops_per_image"] / 1e9, found["roofline_seconds"] * 1e3
    lines.append(
        f"work        {flops:.1f} GFLOP per image; {roof:.1f} ms a step at full speed"
    )
    if "estimate" not in found:
        return "\n".join([*lines, "estimate    none: this chip's cycles are not known"])
    account = found["estimate"]
    if account["priced"]:
        lines.append("estimate    of a step by the compiler, ms; no measurement")
        shape = "{priced:8.2f} + at least {unpriced:.2f} without a price"
    else:
        lines.append("at least    of a step, ms, at full speed; nothing is estimated")
        shape = "{unpriced:8.2f}"
    for part, one in [*account["parts"].items(), ("all", account)]:
        times = {name: 1e3 * one[name] for name in ("priced", "unpriced", "meanwhile")}
        shown = (shape + ", {meanwhile:.2f} meanwhile").format(**times)
        lines.append(f"  {part:<26} {shown}")
    for name, rate in account["images_per_second"].items():
        lines.append(
            f"  {name.replace('_', ' '):<26} {rate:8.0f} images/s per device"
            f"{'' if account['priced'] else ' at most'}, "
            f"{account['utilisation'][name]:.1%} of its FLOP/s"
        )
    return "\n".join(lines)


def verdict(found: dict[str, Any]) -> dict[str, Any]:
    """Whether the step fits, by its peak and by the room that its buffers are given.

    The compiler refuses by the peak of what is alive at once. Laid out in memory,
    buffers leave gaps, and with loops (scan) `temp_bytes` was seen at 1.6 times the
    peak: a step whose buffers have no room is not taken to fit, though it compiles.
    """
    held = found["peak_bytes"]
    if found["compiles"]:
        held = found["argument_bytes"] + found["output_bytes"] + found["temp_bytes"]
        held = max(held - found["alias_bytes"], found["peak_bytes"])
    return {"held_bytes": held, "fits": held <= found["hbm_bytes"]}


def _before(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {it}" for name, it in found["versions"].items())
    axes = " x ".join(f"{name} {size}" for name, size in found["mesh"].items())
    shape = "x".join(map(str, found["image_shape"]))
    parts = found["micro_batches"]
    return (
        f"{found['objective']} for {found['topology']}, {versions}\n"
        f"source      {found['source']}; read as {shape}\n"
        f"mesh        {axes} on {found['devices']} devices\n"
        f"batch       {found['batch_size']} images, {found['batch_per_device']} per "
        "device" + (f", in {parts} micro-batches" if parts > 1 else "") + "\n"
        f"parameters  {found['parameters'] / 1e6:.2f} M; state "
        f"{_gib(found['state_bytes'])} per device"
    )


def _after(found: dict[str, Any]) -> str:
    lines = [f"compiled    in {found['compile_seconds']:.1f} s"]
    if found["compiles"]:
        for name in ("argument", "output", "alias", "temp"):
            lines.append(f"{name:<11} {_gib(found[f'{name}_bytes'])} per device")
    hbm, peak, held = (found[f"{name}_bytes"] for name in ("hbm", "peak", "held"))
    if found["fits"]:
        lines.append(
            f"fits: peak {_gib(peak)} of {_gib(hbm)} per device, {_gib(hbm - peak)} "
            f"spare; laid out, buffers take {_gib(held)}"
        )
        return "\n".join(lines)
    if found["compiles"]:
        lines.append(
            f"may not fit: peak {_gib(peak)} of {_gib(hbm)} per device, but laid out, "
            f"buffers take {_gib(held)}, {_gib(held - hbm)} too much"
        )
    else:
        lines = [
            f"does not fit: it wants {_gib(peak)} of {_gib(hbm)} per device, "
            f"{_gib(peak - hbm)} too much"
        ]
    return "\n".join(lines) + (
        f"; try {'' if found['coupled'] else '--config.accumulate=2, '}"
        "--config.remat=full or --config.mesh.fsdp=2"
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.3f} GiB"


def main(argv: list[str]) -> None:
    """Compile, print, write."""
    del argv  # `parse` left nothing in it
    config, topology = CONFIG.value, _TOPOLOGY.value
    try:
        plan, source = plan_for(config, topology)
    except configs.ConfigError as error:
        leave(f"error: {error}", EXIT_CONFIG)
    if _SEARCH.value:
        ranked = search(config, topology, _MINUTES.value)
        best = [one for one in ranked if one["fits"]][:1]
        print("\n".join(["fastest by estimate:", *map(_tried, best)]), flush=True)
        _write({"topology": topology, "tried": ranked, "config": config.to_dict()})
        if not best:
            os._exit(EXIT_DOES_NOT_FIT)
        return
    found = {"topology": topology, "source": source} | facts(plan)
    print(_before(found), flush=True)  # a full model takes minutes
    sizes, text = compile_step(plan)
    found |= sizes
    found |= verdict(found)
    if text:
        found |= estimate(plan, topology, text)
        print(_costs(found), flush=True)
    print(_after(found), flush=True)
    _write(found | {"config": config.to_dict()})
    if not found["fits"]:
        os._exit(EXIT_DOES_NOT_FIT)


def _write(found: dict[str, Any]) -> None:
    """To the file of --out, if there is one."""
    if not _OUT.value:
        return
    try:
        pathlib.Path(_OUT.value).write_text(json.dumps(found, indent=2) + "\n")
    except OSError as error:
        leave(f"error: out={_OUT.value}: {error.strerror}", EXIT_CONFIG)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
