# SPDX-License-Identifier: Apache-2.0
"""Parts of a checkpoint, read without a trainer: for evaluations and warm starts."""

from typing import Any

import jax
from flax import traverse_util

from mim_jax.run import digests, files, storage
from mim_jax.run.checkpoint import CheckpointError
from mim_jax.schema import ConfigError


def read_parts(
    run: str | files.Place,
    step: int | None = None,
    parts: tuple[str, ...] = ("params",),
) -> tuple[int, dict[str, Any]]:
    """(step, {part: tree}) of a run's checkpoint, on this host's first device.

    Trees are nested dicts with the blocks unstacked. Digests are compared.

    Example:
        >>> step, found = read_parts("runs/mae", parts=("params", "stats"))
        >>> sorted(found["params"]), found["stats"]
        (['decoder', 'encoder'], {})

    Args:
        run: run directory.
        step: which checkpoint; None is the newest.
        parts: fields of TrainState that are nested dicts, so not opt_state. The tree
            is {} where the state had none.
    Raises:
        FileNotFoundError: the run has no such checkpoint; lists the steps that it has.
        CheckpointError: the checkpoint is damaged.
    """
    folder, step, steps = _found(run, step)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        leaves = storage.read_record(folder, step)["leaves"]
        shapes = {
            tuple(name.split("/")): jax.ShapeDtypeStruct(shape, dtype, sharding=device)
            for name, (dtype, shape, _) in leaves.items()
            if name.split("/")[0] in parts and not dtype.startswith("key<")
        }
        shapes = traverse_util.unflatten_dict(shapes)
        # Orbax cannot read nothing.
        found = storage.read_tree(folder, step, shapes) if shapes else {}
        digests.check_leaves(found, leaves)
    except digests.DamageError as error:
        raise CheckpointError(
            f"checkpoint {step} under {folder} is damaged: {error}\nSteps there: "
            f"{', '.join(map(str, steps))}"
        ) from error
    return step, {part: found.get(part, {}) for part in parts}


def newest_leaves(run: str | files.Place) -> tuple[int, dict[str, Any]]:
    """(step, {path: [dtype, shape, digest]}) of a run's newest checkpoint.

    Raises:
        ConfigError: there is none.
        CheckpointError: its record is damaged.
    """
    try:
        folder, step, _ = _found(run, None)
        return step, storage.read_record(folder, step)["leaves"]
    except FileNotFoundError as error:
        raise ConfigError(f"run {str(run)!r}: {error}") from error
    except digests.DamageError as error:
        raise CheckpointError(f"the newest of {run} is damaged: {error}") from error


def _found(
    run: str | files.Place, step: int | None
) -> tuple[files.Place, int, list[int]]:
    """The folder of a run's checkpoints, the step wanted there, and all steps."""
    folder = files.absolute(files.place(run)) / "checkpoints"
    steps = storage.steps_on_disk(folder)
    if not steps or (step is not None and step not in steps):
        raise FileNotFoundError(
            f"no checkpoint{'' if step is None else f' {step}'} under {folder}; steps "
            f"there: {', '.join(map(str, steps)) or 'none'}"
        )
    return folder, steps[-1] if step is None else step, steps
