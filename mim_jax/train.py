# SPDX-License-Identifier: Apache-2.0
"""Job "train": one step function and one loop that serve every objective."""

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
        objective: gives the loss, the teacher and the metrics.
        tx: optax transformation.
        micro_batches: number of parts into which the batch is cut; they are computed
            one after the other.
        branch: as for `choose_state`.
    Returns:
        The next state, and scalars: `loss`, `ok` and the objective's metrics. Where
        the loss or a gradient is not finite, `ok` is False and the old state returns.
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
        branch: True uses `lax.cond`, False a `where` on each leaf. On a CPU the `where`
            takes three times as long. A TPU compiler fuses the `where` into the code
            that computes the leaf, which `lax.cond` would prevent.
    """
    if branch:
        return jax.lax.cond(ok, make, lambda: old)
    return _selected(ok, make(), old)


def _selected(ok: Bool[Array, ""], new: Any, old: Any) -> Any:
    def leaf(new, old):
        return old if new is old else jnp.where(ok, new, old)

    return jax.tree.map(leaf, new, old)


def step_of(plan: Plan) -> Callable[..., Any]:
    """`train_step` with the plan's arguments bound: a function of (state, batch)."""
    return functools.partial(
        train_step,
        objective=plan.objective,
        tx=plan.tx,
        micro_batches=plan.settings.accumulate,
        branch=plan.on_cpus,
    )


def lowered(plan: Plan) -> jax.stages.Lowered:
    """The training step, traced for the plan's mesh.

    The state is donated; the new state has the shardings of the old one.
    """
    state = plan.abstract_state()
    outputs = (sharding.shardings_of(state), sharding.replicated(plan.mesh))
    jitted = jax.jit(step_of(plan), donate_argnums=0, out_shardings=outputs)
    return jitted.lower(state, plan.abstract_batch())


def run(config: configs.Tree, workdir: pathlib.Path) -> None:
    """Train to the config's last step, resuming from the newest checkpoint if there is
    one.

    Raises:
        ConfigError: the config cannot work; nothing was compiled or overwritten.
        MismatchError: the checkpoint belongs to another model; nothing was compiled or
            overwritten.
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
            # XLA's own caches put the folder's name into the cache key, so that a run
            # directory that was moved would compile again.
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
        # The state is saved by now: an interruption here loses nothing, and the next
        # start writes the report again.
        interrupts.patiently(lambda: report.measure(plan, state, workdir))


def _begin(
    plan: Plan, like: TrainState, checkpointer: Checkpointer
) -> tuple[int, TrainState, dict[str, Any]]:
    """(step, state, extra) to start from; `extra` is what `Monitor.saved` returned."""
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
    """Train from step `start` to `plan.stop`; returns the last state."""
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
            "the data set differs from the one that this run began with: it was "
            f"{before} and is now {now}; want the same data set, or another --workdir"
        )
