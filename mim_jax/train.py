# SPDX-License-Identifier: Apache-2.0
"""Job "train": one step function and one loop that serve every objective."""

import dataclasses
import functools
from collections.abc import Callable
from math import inf
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Key
from optax.tree import norm

from mim_jax import config as configs
from mim_jax import optim, sharding
from mim_jax.data.pipeline import train_batches
from mim_jax.plan import Plan
from mim_jax.run import (
    beginning,
    files,
    notes,
    programs,
    report,
    rundir,
    summary,
    warmstart,
)
from mim_jax.run.checkpoint import Checkpointer
from mim_jax.run.during import During
from mim_jax.run.interrupt import Interrupted, Interrupts
from mim_jax.run.monitor import Monitor
from mim_jax.run.profiler import Tracer, traced_steps
from mim_jax.run.spikes import RollBack
from mim_jax.run.wandb_run import check_wandb
from mim_jax.state import TrainState


def train_step(
    state: TrainState, batch, bound=inf, *, objective, tx, micro_batches=1, branch=False
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimiser step of any objective: a pure function of its arguments.

    Args:
        batch: fields of the training example by name, each with a row per image.
        bound: the loss from which on no update is made.
        objective: gives the loss, the teacher and the metrics.
        tx: optax transformation.
        micro_batches: number of parts into which the batch is cut; they are computed
            one after the other.
        branch: as for `choose_state`.
    Returns:
        The next state, and scalars: `loss`, `ok`, those of `optim.norms` and the
        objective's metrics. Where the loss or the norm of the gradients is not finite,
        or the loss not below the bound, `ok` is False and the old state returns.
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
        return dataclasses.replace(state, step=state.step + 1, **new), norm(updates)

    grad_norm = norm(grads)  # not finite if any of their numbers is not
    ok = jnp.isfinite(loss) & (loss < bound) & jnp.isfinite(grad_norm)
    with jax.named_scope("optimiser"):  # profiles and `aot` show this name
        new, update = choose_state(ok, updated, (state, grad_norm), branch)
        norms = optim.norms(grad_norm, update, new.params, new.teacher)
    return new, {"loss": loss, "ok": ok, **norms, **aux.metrics}


def example_keys(state: TrainState, rows: int) -> Key[Array, " {rows}"]:
    """A key for each row of this step's batch, the same on any number of devices."""
    key = jax.random.fold_in(state.key, state.step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))


def choose_state(ok: Bool[Array, ""], make: Callable, old: Any, branch: bool) -> Any:
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
    return jitted.lower(state, plan.abstract_batch(), *plan.abstract_bound())


def run(config: configs.Tree, workdir: files.Place) -> None:
    """Train to the config's last step, resuming from the newest checkpoint if there is
    one.

    Raises:
        ConfigError: the config cannot work; nothing was compiled or overwritten.
        MismatchError: the checkpoint belongs to another model; nothing was compiled or
            overwritten.
        CheckpointError: no checkpoint can be read, or the state could not be saved.
        DiskError: another file could not be written, or the directory is gone.
        DataError: too many records cannot be read; the state is saved.
        NonFiniteError, SpikeError: a loss or gradient was not finite, or spiked.
        Interrupted: SIGTERM or SIGINT came, and the state is saved.
    """
    config = warmstart.counted(warmstart.adopt(config, workdir))
    plan = Plan.of(config)
    settings = plan.settings
    check_wandb(settings.log.wandb)
    with rundir.claim(workdir, "train") as claim, Interrupts() as interrupts:
        rundir.check_shared(workdir)
        changes = rundir.check_config(workdir, config)
        settings.data.source.keep()
        if settings.compile_cache:
            programs.keep()
        with Checkpointer(workdir, settings.checkpoint, claim.check) as checkpointer:
            like = plan.abstract_state()
            about = summary.summarise(plan, like, workdir, changes)
            memory, back = report.InMemory(plan, workdir), None
            while True:
                begin = functools.partial(
                    beginning.begin, plan, like, checkpointer, back
                )
                begun = interrupts.patiently(begin)
                rundir.write_config(workdir, config)
                notes.begin(workdir, about)
                rundir.write_images(workdir, settings.data.source.chosen())
                try:
                    state, closing = _train(memory, checkpointer, interrupts, *begun)
                    break
                except RollBack as spike:
                    # Without its traceback, which holds the state that it leaves.
                    back = spike.with_traceback(None)
        claim.check()
        # The state is saved by now: an interruption here loses nothing, and the next
        # start writes the report again.
        interrupts.patiently(lambda: report.measure(memory, state, closing))


def _train(
    memory: report.InMemory,
    checkpointer: Checkpointer,
    interrupts: Interrupts,
    start: int,
    state: TrainState,
    extra: dict[str, Any],
) -> tuple[TrainState, dict[str, Any]]:
    """The last state of the run, and what evaluations found about it already."""
    plan, workdir = memory.plan, memory.workdir
    monitor = Monitor(plan, workdir, start, extra, checkpointer.newest)
    tracer = Tracer(workdir / "profile", traced_steps(plan.settings.profile))
    during = During(memory, monitor, interrupts)
    try:
        during.catch_up(start, state)
        if start < plan.stop:
            state = _loop(plan, state, monitor, checkpointer, during, tracer)
    finally:
        tracer.close()
        monitor.close()
    return state, during.closing


def _loop(
    plan: Plan,
    state: TrainState,
    monitor: Monitor,
    checkpointer: Checkpointer,
    during: During,
    tracer: Tracer,
) -> TrainState:
    """Train from the state that `monitor` begins with to `plan.stop`; returns the last
    state."""
    settings, interrupts, read = plan.settings, during.interrupts, monitor.read
    try:
        step_fn = interrupts.patiently(lambda: lowered(plan).compile())
    except Interrupted:
        if read == 0:
            checkpointer.save(0, state, monitor.saved())
        raise
    batches = train_batches(
        settings.data,
        seed=settings.seed,
        batch_size=settings.batch_size,
        start=read,
        places=sharding.rows_here(plan.mesh, settings.batch_size),
    )
    with batches, jax.transfer_guard("disallow"):
        for number, batch in enumerate(monitor.timed(batches), read + 1):
            needed = {name: batch[name] for name in plan.reads}
            tracer.before(number)
            needed = sharding.to_devices(needed, plan.mesh)
            state, values = step_fn(state, needed, *monitor.bound(number))
            tracer.after(number, values)
            step = monitor.dispatched(number, values, batch)
            checkpointer.poll()
            leaving = interrupts.asked(step) or during.asked_at(step, state)
            if step % settings.checkpoint.every == 0 or step == plan.stop or leaving:
                step = monitor.settle()
                checkpointer.save(step, state, monitor.saved())
            if step == plan.stop:
                break
            if leaving:
                raise Interrupted
        if monitor.failed is not None:
            checkpointer.save(monitor.settle(), state, monitor.saved())
            raise monitor.failed
    return state
