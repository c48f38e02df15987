# SPDX-License-Identifier: Apache-2.0
"""Job "train": the one loop and the one step, for any objective."""

import dataclasses
import functools
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import parameter_overview

import mim_jax
from mim_jax import config as configs
from mim_jax import optim, sharding
from mim_jax import state as states
from mim_jax.data.pipeline import EvalPasses, Input, check_replaced, train_batches
from mim_jax.evals.base import Eval, Run, caption, save
from mim_jax.objectives.base import LabelObjective, Objective
from mim_jax.ops.backend import compile_for, made_if
from mim_jax.run import log as metrics
from mim_jax.run import rundir, warmstart
from mim_jax.run.checkpoint import Checkpointer
from mim_jax.run.interrupt import Interrupted, Interrupts
from mim_jax.run.profiler import Tracer, traced_steps
from mim_jax.state import TrainState


def train_step(
    state: TrainState, batch: dict[str, Any], *, objective, tx, micro_batches: int = 1
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimiser step of any objective: a pure function of (state, batch)."""
    keys = states.example_keys(state, batch["image"].shape[0])
    grad_fn = jax.value_and_grad(objective.loss, has_aux=True)
    grad_fn = optim.accumulated(grad_fn, micro_batches)
    (loss, aux), grads = grad_fn(state.params, state, batch, keys)

    def updated():
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        teacher = objective.teacher(state.teacher, params, state.step)
        new = dict(params=params, teacher=teacher, stats=aux.stats, opt_state=opt_state)
        return dataclasses.replace(state, step=state.step + 1, **new)

    ok = jnp.isfinite(loss) & optim.all_finite(grads)
    with jax.named_scope("optimiser"):  # as profiles and aot name it
        new_state = made_if(ok, updated, state)  # a bad update replaces no good state
    return new_state, {"loss": loss, "ok": ok, **aux.metrics}


class NonFiniteError(FloatingPointError):
    """A loss or gradient was NaN or infinite; the state before it is safe."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `run` works from, built and checked before anything compiles.

    Attributes:
        settings: the built config.
        mesh: of devices.
        tx: optax transformation.
        schedule: learning rate at a step.
        total, stop: steps of the whole run, and where this process ends.
    """

    settings: configs.Train
    mesh: jax.sharding.Mesh
    tx: optax.GradientTransformationExtraArgs
    schedule: Any
    total: int
    stop: int

    @classmethod
    def of(
        cls,
        config: configs.Tree,
        devices: list | None = None,
        stand_in: bool = False,
    ) -> "Plan":
        """The plan of a config.

        Args:
            devices: to run on; None: all of this process.
            stand_in: the source stands for another that is not here: its images are
                of the right shape, and its labels do not matter.
        Raises:
            ConfigError: the parts do not fit each other or this machine.
        """
        settings = configs.build(config)
        objective, data = settings.objective, settings.data
        try:
            mesh = settings.mesh.build(devices)
            _check_reads(objective, data)
            settings.report.check_objective(objective)
            if not stand_in:
                _check_labels(objective, data)
                settings.report.check_data(objective, EvalPasses(data))
            data.source.chosen()  # refuses here what only labels can tell
        except ValueError as error:
            raise configs.ConfigError(f"config: {error}") from error
        if objective.batch_coupled and settings.accumulate > 1:
            if not settings.accumulate_coupled:
                raise configs.ConfigError(
                    f"config.accumulate={settings.accumulate}: in the loss of "
                    f"{type(objective).__name__} every image depends on the whole "
                    "batch, so micro-batches are another loss; want accumulate=1, or "
                    "--config.accumulate_coupled=true to work per micro-batch"
                )
        rows = settings.batch_size // settings.accumulate
        parts = sharding.row_parts(mesh)
        if rows % parts:
            raise configs.ConfigError(
                f"config.batch_size={settings.batch_size} in "
                f"{settings.accumulate} micro-batch(es) on {parts} parts of the mesh: "
                f"want a multiple of {settings.accumulate * parts}"
            )
        total = settings.steps
        if total is None:
            draws = settings.epoch_images or len(data.source)
            total = math.ceil(settings.epochs * draws / settings.batch_size)
        stop = min(total, settings.stop_after or total)
        objective = objective.for_run(total)
        settings = dataclasses.replace(settings, objective=objective)
        schedule = settings.optim.schedule(settings.batch_size, settings.epochs, total)
        tx = settings.optim.build(schedule, total, objective.frozen)
        return cls(settings, mesh, tx, schedule, total, stop)

    @property
    def epoch_images(self) -> int:
        """Images drawn in an epoch."""
        return self.settings.epoch_images or len(self.settings.data.source)

    @property
    def create(self):
        """A function of nothing that makes the first state."""
        settings = self.settings
        return functools.partial(
            states.create,
            settings.objective,
            self.tx,
            seed=settings.seed,
            image_shape=settings.data.image_shape,
            scan=settings.scan,
        )

    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of the state."""
        shapes = jax.eval_shape(self.create)
        return _placed(shapes, sharding.by_path(shapes, self.mesh))

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape, type and sharding of what a step reads."""
        rows, rule = self.settings.batch_size, sharding.by_row(self.mesh)
        shapes = self.settings.data.shapes
        return {
            name: jax.ShapeDtypeStruct((rows, *shape), kind, sharding=rule)
            for name in self.settings.objective.reads
            for shape, kind in [shapes[name]]
        }

    def lowered(self) -> jax.stages.Lowered:
        """The training step, traced for this mesh: the state is donated, and its
        shardings are those it came with."""
        step = functools.partial(
            train_step,
            objective=self.settings.objective,
            tx=self.tx,
            micro_batches=self.settings.accumulate,
        )
        state = self.abstract_state()
        placed = jax.tree.map(lambda leaf: leaf.sharding, state)
        outputs = (placed, sharding.replicated(self.mesh))
        jitted = jax.jit(step, donate_argnums=0, out_shardings=outputs)
        with compile_for(self.mesh.devices.flat[0].platform, self.mesh):
            return jitted.lower(state, self.abstract_batch())


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
            _summary(plan, like, workdir, changes)
            start, state, extra = interrupts.patiently(
                lambda: _begin(plan, like, checkpointer)
            )
            rundir.write_config(workdir, config)
            rundir.write_images(workdir, settings.data.source.chosen())
            book = Book(plan, workdir, start, extra, checkpointer.newest)
            tracer = Tracer(workdir / "profile", traced_steps(settings.profile))
            try:
                if start < plan.stop:
                    state = _loop(
                        plan, state, start, book, checkpointer, interrupts, tracer
                    )
            finally:
                tracer.close()
                book.close()
        # All is saved by now: who leaves here loses nothing, and the next start
        # makes the report again.
        interrupts.patiently(lambda: _report(plan, state, workdir))


def _begin(
    plan: Plan, like: TrainState, checkpointer: Checkpointer
) -> tuple[int, TrainState, dict[str, Any]]:
    """(step, state, what was kept with it) to go on from."""
    found = checkpointer.restore(like)
    if found is None:
        placed = jax.tree.map(lambda leaf: leaf.sharding, like)
        state = jax.jit(plan.create, out_shardings=placed)()
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
    book: "Book",
    checkpointer: Checkpointer,
    interrupts: Interrupts,
    tracer: Tracer,
) -> TrainState:
    """Steps `start` to `plan.stop` of a run; returns the last state."""
    settings = plan.settings
    try:
        step_fn = interrupts.patiently(lambda: plan.lowered().compile())
    except Interrupted:
        if start == 0:
            checkpointer.save(0, state, book.saved())
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
        for step, batch in enumerate(book.timed(batches), start + 1):
            needed = {name: batch[name] for name in settings.objective.reads}
            tracer.before(step)
            state, values = step_fn(state, sharding.to_devices(needed, plan.mesh))
            tracer.after(step, values)
            book.dispatched(step, values, batch)
            checkpointer.poll()
            leaving = interrupts.asked(step)
            if step % settings.checkpoint.every == 0 or step == plan.stop or leaving:
                book.settle()
                checkpointer.save(step, state, book.saved())
            if leaving and step < plan.stop:
                raise Interrupted
    return state


class Book:
    """The host's account of a run. It reads a step's metrics while the next one runs:
    means to log, images that could not be decoded, values that are not finite."""

    def __init__(
        self,
        plan: Plan,
        workdir: pathlib.Path,
        start: int,
        extra: dict,
        newest: Callable[[], int | None],
    ):
        self._plan, self._workdir, self._newest = plan, workdir, newest
        self._window = metrics.Window(extra.get("window"))
        first_host = jax.process_index() == 0
        self._replaced = extra.get("replaced", 0) if first_host else 0  # by this host
        self._pending: tuple | None = None
        log = plan.settings.log
        self._writer = metrics.Writer(workdir, log, start) if first_host else None
        mode = log.progress if first_host else "none"
        self._progress = metrics.Progress(mode, start, plan.stop)
        self._mark, self._steps_since, self._waiting = time.monotonic(), 0, 0.0

    def timed(self, batches: Iterable) -> Iterator:
        """The batches, with the time spent waiting for each booked."""
        iterator = iter(batches)
        while True:
            before = time.monotonic()
            batch = next(iterator, None)
            self._waiting += time.monotonic() - before
            if batch is None:
                return
            yield batch

    def dispatched(self, step: int, values: dict, batch: dict) -> None:
        """`step` steps are on their way to the device; read the one before."""
        self.settle()
        indices = np.array(batch["index"])  # a copy: the batch lies in shared memory
        self._pending = (step, values, indices, int(batch["replaced"].sum()))

    def settle(self) -> None:
        """Read the metrics that are outstanding, waiting for them if need be.

        Raises:
            NonFiniteError: that step's loss or gradients were not finite.
            RuntimeError: too many images could not be decoded.
        """
        if self._pending is None:
            return
        step, values, indices, replaced = self._pending
        self._pending = None
        values = {name: float(v) for name, v in jax.device_get(values).items()}
        if not values.pop("ok"):
            raise NonFiniteError(self._not_finite(step, values["loss"], indices))
        self._replaced += replaced
        self._window.add(values)
        self._steps_since += 1
        self._progress.advance(step)
        if step % self._plan.settings.log.every == 0 or step == self._plan.total:
            self._log(step)

    def saved(self) -> dict[str, Any]:
        """What to keep with the checkpoint of this step, plain JSON values."""
        return {
            "window": self._window.saved(),
            "replaced": sum(sharding.from_hosts(self._replaced)),
            "data": self._plan.settings.data.source.fingerprint(),
        }

    def close(self) -> None:
        """Close files and bar."""
        self._progress.close()
        if self._writer is not None:
            self._writer.close()

    def _log(self, step: int) -> None:
        settings = self._plan.settings
        elapsed = max(time.monotonic() - self._mark, 1e-9)
        replaced = sum(sharding.from_hosts(self._replaced))
        values = self._window.take() | {
            # The rate at which this step's update was made: steps count from 0.
            "lr": float(self._plan.schedule(step - 1)),
            "epoch": step * settings.batch_size / self._plan.epoch_images,
            "replaced": replaced,
            "images_per_second": self._steps_since * settings.batch_size / elapsed,
            "input_wait_share": self._waiting / elapsed,
        }
        self._mark, self._steps_since, self._waiting = time.monotonic(), 0, 0.0
        if self._writer is not None:
            self._writer.write(step, values)
        self._progress.show(step, values)
        # A share of at least one epoch, so that one bad image at the start is no alarm.
        seen = max(step * settings.batch_size, len(settings.data.source))
        check_replaced(replaced, seen, settings.data.max_replaced)

    def _not_finite(self, step: int, loss: float, indices: np.ndarray) -> str:
        path = self._workdir / f"nonfinite-step{step}-host{jax.process_index()}.json"
        path.write_text(json.dumps({"step": step, "indices": indices.tolist()}) + "\n")
        shown = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
        newest = self._newest()
        good = "none yet" if newest is None else f"step {newest}"
        return (
            f"step {step}: loss {loss} or its gradient is not finite; the update was "
            f"not made. Records of the batch: {shown} (all in {path}). Last good "
            f"checkpoint: {good}. Look at those images, or lower "
            "config.optim.base_lr."
        )


def _summary(
    plan: Plan, state: TrainState, workdir: pathlib.Path, changes: list[str]
) -> None:
    """What is about to run: printed, and the parameters in full as parameters.txt."""
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
        f"mesh        {axes} on {plan.mesh.size} x {device}, "
        f"{jax.process_count()} host(s)\n"
        f"source      {type(data.source).__name__.lower()}: {len(data.source)} images, "
        f"read as {rows}x{cols}x{channels}\n"
        f"length      {plan.total} steps of {settings.batch_size} images"
        + ("" if plan.stop == plan.total else f", stopping after {plan.stop}")
        + "".join(f"\nchanged     {line}" for line in changes),
        flush=True,
    )


def _report(plan: Plan, state: TrainState, workdir: pathlib.Path) -> None:
    """The evaluation named by config.report, on the state as it is, on one host."""
    settings, mesh = plan.settings, plan.mesh
    everywhere = sharding.replicated(mesh)
    gather = jax.jit(lambda tree: tree, out_shardings=everywhere)
    params, stats = gather(state.params), gather(state.stats)

    def make():
        shape = settings.data.image_shape
        first = states.initial(
            settings.objective, seed=settings.seed, image_shape=shape
        )
        return states.layout(first[0], settings.scan)

    initial = jax.jit(make, out_shardings=everywhere)()
    if jax.process_index() != 0:
        return
    trained = Run(
        objective=settings.objective,
        params=jax.device_get(params),
        stats=jax.device_get(stats),
        initial=jax.device_get(initial),
        step=int(state.step),
        name=workdir.resolve().name,
    )
    report = settings.report.measure(trained, EvalPasses(settings.data))
    names = {cls: name for name, cls in configs.KINDS[Eval][1].items()}
    name = names[type(settings.report)]
    found = {caption(trained): report}
    save(workdir / "report", name, found, settings.report.draw(found))


def _check_reads(objective: Objective, data: Input) -> None:
    """ValueError unless the data offer what an objective reads, in shapes that fit."""
    shapes = data.shapes
    for name in objective.reads:
        if name not in shapes:
            want = {"image2": "data.crops=2", "local": "data.local_crops >= 1"}[name]
            raise ValueError(
                f"data has no {name!r}, which {type(objective).__name__} reads; want "
                f"config.{want}"
            )
        shape, _ = shapes[name]
        if len(shape) >= 3:
            rows, cols, channels = shape[-3:]
            objective.check_shape((rows, cols, channels))


def _check_labels(objective: Objective, data: Input) -> None:
    """ValueError if an objective reads labels that are not there or leaves some out."""
    if "label" not in objective.reads:
        return
    if not data.source.classes:
        raise ValueError(
            f"data.source has no labels, which {type(objective).__name__} reads; want "
            "a source with classes, such as digits"
        )
    known = len(data.source.classes)
    if isinstance(objective, LabelObjective) and objective.classes < known:
        raise ValueError(
            f"objective.classes={objective.classes}: data.source has {known}, and "
            f"images of the others would be left out; want {known}"
        )


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        shapes,
        shardings,
    )


def _same_data(before: dict, now: dict) -> None:
    if before != now:
        raise configs.ConfigError(
            f"the data are not those that this run began with: {before} then, {now} "
            "now; want the same data set, or another --workdir"
        )
