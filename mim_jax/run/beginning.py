# SPDX-License-Identifier: Apache-2.0
"""Where a training run begins: at its newest checkpoint, or with a new state."""

from typing import Any

import jax

from mim_jax import config as configs
from mim_jax.data.pipeline import identity
from mim_jax.plan import Plan
from mim_jax.run import warmstart
from mim_jax.run.checkpoint import Checkpointer
from mim_jax.run.spikes import RollBack
from mim_jax.state import TrainState


def begin(
    plan: Plan, like: TrainState, checkpointer: Checkpointer, back: RollBack | None
) -> tuple[int, TrainState, dict[str, Any]]:
    """(step, state, extra) to start from; `extra` is what `Monitor.saved` returned.

    Args:
        like: the state as ShapeDtypeStructs with shardings.
        back: why the run goes back to here; None when it starts.
    Raises:
        ConfigError: the data set is another one, or config.init_from cannot be used.
        CheckpointError, MismatchError: as `Checkpointer.restore`.
    """
    if back is not None:
        checkpointer.go_back()
    found = checkpointer.restore(like)
    if found is None:
        state = plan.first_state()
        if plan.settings.init_from.run:
            state, account = warmstart.begun(state, like, plan.settings)
            if jax.process_index() == 0:
                print(account, flush=True)
        found = 0, state, {}
    else:
        _same_data(plan, found[2]["data"])
        if jax.process_index() == 0:
            print(f"resumed from step {found[0]}", flush=True)
    start, state, extra = found
    return start, state, extra if back is None else back.skipping(start, extra)


def _same_data(plan: Plan, before: dict) -> None:
    settings, now = plan.settings, identity(plan.settings.data.source)
    if before != now and settings.on_change == "refuse":
        raise configs.ConfigError(
            "the data set differs from the one that this run began with: it was "
            f"{before} and is now {now}; want the same data set, another --workdir, or "
            "--config.on_change=accept to go on with this one, in an order of its own"
        )
