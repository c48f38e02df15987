# SPDX-License-Identifier: Apache-2.0
"""A summary of the run that starts: lines for people, and all parameters in a file."""

import jax
from clu import parameter_overview

import mim_jax
from mim_jax import config as configs
from mim_jax import sharding
from mim_jax import state as states
from mim_jax.objectives.base import LabelObjective
from mim_jax.plan import Plan
from mim_jax.run import files
from mim_jax.state import TrainState

_SHORT = 100  # steps: a run of fewer hardly learns


def summarise(
    plan: Plan, state: TrainState, workdir: files.Place, changes: list[str]
) -> str:
    """Print a summary of the run that starts, and write parameters.txt.

    Args:
        plan: of the run.
        state: the state's shapes and shardings.
        workdir: directory of the run.
        changes: lines on config leaves that differ from the config saved in `workdir`.
    Returns:
        What was printed, on the first host.
    """
    if jax.process_index() != 0:
        return ""
    settings, data = plan.settings, plan.settings.data
    per_block = jax.eval_shape(states.unstack_blocks, state.params)
    table = parameter_overview.get_parameter_overview(per_block, include_stats=False)
    files.write(workdir / "parameters.txt", table + "\n")
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
    note = f"; {data.source.note}" if data.source.note else ""
    text = (
        f"mim_jax {mim_jax.__version__}, {type(settings.objective).__name__} in "
        f"{workdir}\n"
        f"parameters  {count:.2f} M ({parts}); state {held:.0f} MiB per device\n"
        f"work        {flops:.3g} GFLOP per image and step, {settings.dtype}\n"
        f"kernels     {plan.forms}\n"
        f"mesh        {axes} on {plan.mesh.size} x {device}, "
        f"{jax.process_count()} host(s)\n"
        f"source      {type(data.source).__name__.lower()}: {len(data.source)} images, "
        f"read as {rows}x{cols}x{channels}{note}\n"
        f"{_decided(settings)}"
        f"length      {plan.total} steps of {settings.batch_size} images{_few(plan)}"
        + ("" if plan.stop == plan.total else f", stopping after {plan.stop}")
        + "".join(f"\nchanged     {line}" for line in changes)
    )
    print(text, flush=True)
    return text


def _few(plan: Plan) -> str:
    """A hint where a batch is larger than the data, and so the run is short."""
    batch, images = plan.settings.batch_size, len(plan.settings.data.source)
    if batch <= images or plan.total >= _SHORT:
        return ""
    return (
        f"; each batch has every image {batch / images:.0f} times: want a "
        f"config.batch_size below {images}"
    )


def _decided(settings: configs.Train) -> str:
    """Lines that say what another run, or the source, decided."""
    lines, begin = [], settings.init_from
    if begin.run and begin.data:
        lines.append(f"taken       data.{', data.'.join(begin.data)} as in {begin.run}")
    if settings.count_classes and isinstance(settings.objective, LabelObjective):
        names = settings.data.source.classes
        more = ", ..." if len(names) > 5 else ""
        lines.append(f"classes     {len(names)}: {', '.join(names[:5])}{more}")
    return "".join(f"{line}\n" for line in lines)
