# SPDX-License-Identifier: Apache-2.0
"""A summary of the run that starts: printed lines, and all parameters in a file."""

import pathlib

import jax
from clu import parameter_overview

import mim_jax
from mim_jax import sharding
from mim_jax import state as states
from mim_jax.plan import Plan
from mim_jax.state import TrainState


def summarise(
    plan: Plan, state: TrainState, workdir: pathlib.Path, changes: list[str]
) -> None:
    """Print a summary of the run that starts, and write parameters.txt.

    Args:
        plan: of the run.
        state: the state's shapes and shardings.
        workdir: directory of the run.
        changes: lines on config leaves that differ from the config saved in `workdir`.
    """
    if jax.process_index() != 0:
        return
    settings, data = plan.settings, plan.settings.data
    per_block = jax.eval_shape(states.unstack_blocks, state.params)
    table = parameter_overview.get_parameter_overview(per_block, include_stats=False)
    (workdir / "parameters.txt").write_text(table + "\n")
    parts = ", ".join(
        f"{name} {sum(x.size for x in jax.tree.leaves(part)) / 1e6:.2f} M"
        for name, part in state.params.items()
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params)) / 1e6
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    held = sharding.bytes_per_device(state, placed) / 2**20
    flops = settings.objective.flops(data.image_shape) / 1e9
    rows, cols, channels = data.image_shape
    axes = " x ".join(f"{name} {size}" for name, size in plan.mesh.shape.items())
    device = plan.mesh.devices.flat[0].device_kind
    print(
        f"mim_jax {mim_jax.__version__}, {type(settings.objective).__name__} in "
        f"{workdir}\n"
        f"parameters  {count:.2f} M ({parts}); state {held:.0f} MiB per device\n"
        f"work        {flops:.3g} GFLOP per image and step, {settings.dtype}\n"
        f"kernels     {plan.forms}\n"
        f"mesh        {axes} on {plan.mesh.size} x {device}, "
        f"{jax.process_count()} host(s)\n"
        f"source      {type(data.source).__name__.lower()}: {len(data.source)} images, "
        f"read as {rows}x{cols}x{channels}\n"
        f"length      {plan.total} steps of {settings.batch_size} images"
        + ("" if plan.stop == plan.total else f", stopping after {plan.stop}")
        + "".join(f"\nchanged     {line}" for line in changes),
        flush=True,
    )
