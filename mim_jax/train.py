# SPDX-License-Identifier: Apache-2.0
"""Job "train": the one step and the one loop, for any objective."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Key

from mim_jax import config as configs
from mim_jax import optim, sharding
from mim_jax.data.pipeline import train_batches
from mim_jax.plan import Plan
from mim_jax.run import report, rundir, summary, warmstart
from mim_jax.run.checkpoint import Checkpointer
from mim_jax.run.interrupt import Interrupted, Interrupts
from mim_jax.run.monitor import Monitor
from mim_jax.run.profiler import Tracer, traced_steps
from mim_jax.state import TrainState

Batch = dict[str, Any]


def train_step(
    state: TrainState, batch: Batch, *, objective, tx, micro_batches=1, branch=False
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimiser step of any objective: a pure function of (state, batch).

    Args:
        batch: fields of the training example by name, each with a row per image.
        objective, tx: what is learned, and the optax transformation.
        micro_batches: parts of the batch that are computed one after the other.
        branch: of `choose_state`.
    Returns:
        The next state, and scalars: the loss, `ok` (False: loss or gradients were not
        finite, and the state is the old one), the objective's metrics.
    """
    keys = example_keys(state, len(jax.tree.leaves(batch)[0]))
    grad_fn = jax.value_and_grad(objective.loss, has_aux=True)
    if micro_batches > 1:
        grad_fn = optim.accumulated(grad_fn, micro_batches)
    (loss, aux), grads = grad_fn(state.params, state, batch, keys)

    def updated():
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        teacher = objective.teacher(state.teacher, params, state.step)
        new = dict(params=params, teacher=teacher, stats=aux.stats, opt_state=opt_state)
        if state.memory is not None:
            new |= dict(memory=objective.next_memory(state, params, batch, keys))
        return dataclasses.replace(state, step=state.step + 1, **new)

    ok = jnp.isfinite(loss) & optim.all_finite(grads)
    with jax.named_scope("optimiser"):  # profiles and `aot` show this name
        new_state = choose_state(ok, updated, state, branch)
    return new_state, {"loss": loss, "ok": ok, **aux.metrics}


def example_keys(state: TrainState, rows: int) -> Key[Array, " {rows}"]:
    """A key for each row of this step's batch, the same on any number of devices."""
    key = jax.random.fold_in(state.key, state.step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))


def choose_state(
    ok: Bool[Array, ""], make: Callable[[], Any], old: Any, branch: bool
) -> Any:
    """The state that `make` returns if ok, else the old one: a bad update never
    replaces a good state.

    Args:
        branch: take a branch instead of a selection leaf by leaf. On a CPU selecting
            takes three times as long; on a TPU it is part of what makes the leaf, and a
            branch would cut it off.
    """
    if branch:
        return jax.lax.cond(ok, make, lambda: old)
    return _selected(ok, make(), old)


def _selected(ok: Bool[Array, ""], new: Any, old: Any) -> Any:
    def leaf(new, old):
        return old if new is old else jnp.where(ok, new, old)

    return jax.tree.map(leaf, new, old)


def step_of(plan: Plan) -> Callable[..., Any]:
    """`train_step` of a plan: a function of (state, batch)."""
    return functools.partial(
        train_step,
        objective=plan.objective,
        tx=plan.tx,
        micro_batches=plan.settings.accumulate,
        branch=plan.on_cpus,
    )


def lowered(plan: Plan) -> jax.stages.Lowered:
    """The training step, traced for the plan's mesh: the state is donated, and its
    shardings are those it came with."""
    state = plan.abstract_state()
    outputs = (sharding.shardings_of(state), sharding.replicated(plan.mesh))
    jitted = jax.jit(step_of(plan), donate_argnums=0, out_shardings=outputs)
    return jitted.lower(state, plan.abstract_batch())


def run(config: configs.Tree, workdir: pathlib.Path) -> None:
    """Train to the config's last step, going on from the newest checkpoint.

    Raises:
        ConfigError: the config cannot work; nothing was compiled or written over.
        MismatchError: the checkpoint is of another model; likewise.
        CheckpointError: no checkpoint can be read, or the state could not be saved.
        NonFiniteError: a loss or gradient was not finite.
        Interrupted: SIGTERM or SIGINT came, and the state is saved.
    """
    config = warmstart.adopt(config, workdir)
    plan = Plan.of(config)
    settings = plan.settings
    with rundir.claim(workdir), Interrupts() as interrupts:
        changes = rundir.check_config(workdir, config)
        if settings.compile_cache:
            jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
            # Else the folder's name is part of the key: a moved run compiles anew.
            jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
        with Checkpointer(workdir, settings.checkpoint) as checkpointer:
            like = plan.abstract_state()
            summary.summarise(plan, like, workdir, changes)
            start, state, extra = interrupts.patiently(
                lambda: _begin(plan, like, checkpointer)
            )
            rundir.write_config(workdir, config)
            rundir.write_images(workdir, settings.data.source.chosen())
            monitor = Monitor(plan, workdir, start, extra, checkpointer.newest)
            tracer = Tracer(workdir / "profile", traced_steps(settings.profile))
            try:
                if start < plan.stop:
                    state = _loop(
                        plan, state, start, monitor, checkpointer, interrupts, tracer
                    )
            finally:
                tracer.close()
                monitor.close()
        # All is saved by now: who leaves here loses nothing, and the next start
        # makes the report again.
        interrupts.patiently(lambda: report.measure(plan, state, workdir))


def _begin(
    plan: Plan, like: TrainState, checkpointer: Checkpointer
) -> tuple[int, TrainState, dict[str, Any]]:
    """(step, state, what was kept with it) to go on from."""
    found = checkpointer.restore(like)
    if found is None:
        state = jax.jit(plan.create, out_shardings=sharding.shardings_of(like))()
        if plan.settings.init_from.run:
            state, account = warmstart.begun(state, like, plan.settings)
            if jax.process_index() == 0:
                print(account, flush=True)
        return 0, state, {}
    start, state, extra = found
    _same_data(extra["data"], plan.settings.data.source.fingerprint())
    if jax.process_index() == 0:
        print(f"resumed from step {start}", flush=True)
    return start, state, extra


def _loop(
    plan: Plan,
    state: TrainState,
    start: int,
    monitor: Monitor,
    checkpointer: Checkpointer,
    interrupts: Interrupts,
    tracer: Tracer,
) -> TrainState:
    """Steps `start` to `plan.stop` of a run; returns the last state."""
    settings = plan.settings
    try:
        step_fn = interrupts.patiently(lambda: lowered(plan).compile())
    except Interrupted:
        if start == 0:
            checkpointer.save(0, state, monitor.saved())
        raise
    batches = train_batches(
        settings.data,
        seed=settings.seed,
        batch_size=settings.batch_size,
        start=start,
        stop=plan.stop,
        places=sharding.rows_here(plan.mesh, settings.batch_size),
    )
    with batches, jax.transfer_guard("disallow"):
        for step, batch in enumerate(monitor.timed(batches), start + 1):
            needed = {name: batch[name] for name in plan.reads}
            tracer.before(step)
            state, values = step_fn(state, sharding.to_devices(needed, plan.mesh))
            tracer.after(step, values)
            monitor.dispatched(step, values, batch)
            checkpointer.poll()
            leaving = interrupts.asked(step)
            if step % settings.checkpoint.every == 0 or step == plan.stop or leaving:
                monitor.settle()
                checkpointer.save(step, state, monitor.saved())
            if leaving and step < plan.stop:
                raise Interrupted
    return state


def _same_data(before: dict, now: dict) -> None:
    if before != now:
        raise configs.ConfigError(
            f"the data are not those that this run began with: {before} then, {now} "
            "now; want the same data set, or another --workdir"
        )
