# SPDX-License-Identifier: Apache-2.0
"""What a command needs, tried before it is given: flags --doctor and --check of `main`.

--doctor tries it on the devices of this machine: mesh, memory, disk, data, a few steps.
--check asks less, on a machine that lacks the devices and perhaps the data: whether the
config can work on so many devices. Neither leaves anything in the work directory.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from mim_jax import config as configs
from mim_jax import sharding
from mim_jax.aot.devices import over_memory
from mim_jax.aot.lines import after_compiling
from mim_jax.aot.step import plan_on, sizes, verdict
from mim_jax.data.passes import EvalPasses
from mim_jax.data.pipeline import train_batches
from mim_jax.plan import Plan
from mim_jax.run import files, hosts, loading, rundir, storage, warmstart
from mim_jax.run.wandb_run import check_wandb
from mim_jax.train import lowered

_WRITTEN = 2**24  # bytes that are written and read back
_STEPS = 5  # that are timed, after one that is not
_READING = 20.0  # seconds of reading that are timed, at most


def check(config: configs.Tree, devices: int) -> None:
    """Refuse a command that could not work on so many devices of another machine.

    Nothing is compiled or written. Data and runs that are not on this machine are not
    looked at, and the printed line says so.

    Raises:
        ConfigError: as `Plan.of`.
    """
    if config.job != "train":
        configs.build(config)
        print(f"checked: the config of job {config.job!r}; no run and no data")
        return
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(devices, 1))
    config, notes = config.copy_and_resolve_references(), []
    begun = config.init_from.run
    if begun and ("://" in begun or not pathlib.Path(begun).exists()):
        notes.append(f"init_from.run={config.init_from.run} is not here")
        config.init_from.run = ""
    if config.attention not in ("auto", "plain"):
        notes.append(f"attention={config.attention} needs the devices")
        config.attention = "auto"
    plan, source = plan_on(config, jax.devices())
    length = f"{plan.total} steps"
    if source != config.data.source.name:
        notes.append(source)
        if config.steps is None:
            length = f"{config.epochs:g} epochs"
    print(
        f"checked: {type(plan.objective).__name__} on {plan.mesh.size} devices, "
        + length
        + "".join(f"; not checked: {note}" for note in notes),
        flush=True,
    )


def examine(
    config: configs.Tree, workdir: files.Place, price: float | None = None
) -> None:
    """Try what a command needs, and print it line by line.

    Args:
        price: of an hour of all devices, in the user's currency.
    Raises:
        ConfigError, CheckpointError, DiskError, DataError, FloatingPointError: what the
            run would end with; or its step does not fit into the devices' memory.
    """
    with _left_as_it_was(workdir):
        if config.job == "train":
            _Training(config, workdir).examine(price)
        else:
            _other(config, workdir)
    _say("doctor", "nothing stands in the way")


@dataclasses.dataclass
class _Pace:
    """Seconds that one step takes.

    Attributes:
        reading: for the host that reads most slowly.
        computing: for the devices.
    """

    reading: float
    computing: float

    @property
    def step(self) -> float:
        return max(self.reading, self.computing)


class _Training:
    """A training run that is examined."""

    def __init__(self, config: configs.Tree, workdir: files.Place):
        self._config = warmstart.counted(warmstart.adopt(config, workdir))
        self._workdir = workdir
        self._plan = Plan.of(self._config)
        self._settings = self._plan.settings
        self._like = self._plan.abstract_state()
        check_wandb(self._settings.log.wandb)

    def examine(self, price: float | None) -> None:
        """Try everything, the cheapest first."""
        mesh, data = self._plan.mesh, self._settings.data
        axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
        kind = mesh.devices.flat[0].device_kind
        many = f"{mesh.size} x {kind}, {jax.process_count()} host(s)"
        _say("devices", f"{many}; mesh {axes}")
        _say("kernels", self._plan.forms)
        done = self._disk()
        step = self._compiled()
        held_out = data.source.held_out()
        _say(
            "source",
            f"{type(data.source).__name__.lower()}: {len(data.source)} images, read as "
            f"{'x'.join(map(str, data.image_shape))}; {len(held_out)} held out",
        )
        self._held_out()
        reading, batch = self._read()
        pace = _Pace(reading, self._stepped(step, batch))
        self._length(done, pace, price)

    def _disk(self) -> int:
        """Try the work directory; returns the step that the run would go on from."""
        state = self._like
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in _arrays(state))
        wanted = size * (self._settings.checkpoint.keep + 1)
        with rundir.claim(self._workdir, "train"):
            rundir.check_shared(self._workdir)
            changes = rundir.check_config(self._workdir, self._config)
            _try_disk(self._workdir, wanted)
            steps = storage.steps_on_disk(self._workdir / "checkpoints")
        for line in changes:
            _say("changed", line)
        said = f"{_mib(size)} each, every {self._settings.checkpoint.every} steps"
        if steps:
            said += f"; the run goes on from step {steps[-1]}"
        _say("checkpoints", said)
        return steps[-1] if steps else 0

    def _compiled(self) -> Callable[..., Any]:
        """The step, which fits into the memory of the devices.

        Raises:
            ConfigError: it does not.
        """
        started = time.monotonic()
        memory, compiled = _memory(), None
        found: dict[str, Any] = {"note": "", "hbm_bytes": memory}
        found |= {"coupled": self._settings.objective.batch_coupled}
        try:
            compiled = lowered(self._plan).compile()
        except jax.errors.JaxRuntimeError as error:
            peak, found["hbm_bytes"] = over_memory(error)
            found |= {"compiles": False, "peak_bytes": peak}
        else:
            found |= sizes(compiled)
        found |= {"compile_seconds": time.monotonic() - started}
        found |= verdict(found)
        *lines, said = after_compiling(found).splitlines()
        for line in lines:
            _say(*line.split(None, 1))
        if compiled is None or not found["fits"]:
            raise configs.ConfigError(f"config: the step {said}")
        _say("memory", said)
        return compiled

    def _held_out(self) -> None:
        """Read a batch of held-out images."""
        begun = time.monotonic()
        read = EvalPasses(self._settings.data).held_out()
        with read as batches, hosts.deadline("a batch of held-out images"):
            batch = next(batches)
            sound, bad = int(batch["valid"].sum()), int(batch["replaced"].sum())
        seconds = time.monotonic() - begun
        _say("held-out", f"{sound} images read in {seconds:.1f} s, {bad} unreadable")

    def _read(self) -> tuple[float, dict[str, np.ndarray]]:
        """(seconds that a batch takes, a batch): of the host that is slowest."""
        data, size = self._settings.data, self._settings.batch_size
        places = sharding.rows_here(self._plan.mesh, size)
        ahead = max(data.processes, 1) * (data.prefetch + 1)
        sampled = train_batches(
            data, seed=self._settings.seed, batch_size=size, places=places
        )
        with sampled as batches, hosts.deadline("a few batches of its own data"):
            batch = {name: np.array(rows) for name, rows in next(batches).items()}
            bad = [batch["replaced"].sum()]
            # What was read before anybody waited would flatter the pace.
            bad += [one["replaced"].sum() for one in _for_a_while(batches, ahead)]
            begun = time.monotonic()
            timed = [one["replaced"].sum() for one in _for_a_while(batches, ahead + 4)]
            seconds = (time.monotonic() - begun) / len(timed)
        bad += timed
        micros = hosts.from_hosts(int(1e6 * seconds), "the pace of reading")
        seconds = max(micros) / 1e6
        _say(
            "reading",
            f"{len(places) / seconds:.0f} images/s by each host; {sum(bad)} of "
            f"{len(bad) * len(places)} unreadable",
        )
        return seconds, batch

    def _stepped(self, step: Callable[..., Any], batch: dict[str, np.ndarray]) -> float:
        """Seconds of a step, without reading.

        Raises:
            NonFiniteError: its loss or gradient is not finite.
        """
        plan = self._plan
        state = plan.first_state()
        if self._settings.init_from.run:
            state, account = warmstart.begun(state, self._like, self._settings)
            _say(*account.split("  ", 1))
        bound = ()
        if plan.abstract_bound():
            bound = (sharding.everywhere(np.asarray(math.inf, np.float32), plan.mesh),)
        needed = {name: batch[name] for name in plan.reads}
        needed = sharding.to_devices(needed, plan.mesh)
        with hosts.deadline("all hosts to compute a few steps"):
            state, values = step(state, needed, *bound)
            jax.block_until_ready(values)
            begun = time.monotonic()
            for _ in range(_STEPS):
                state, values = step(state, needed, *bound)
            losses = jax.device_get(values)
        seconds = (time.monotonic() - begun) / _STEPS
        if not losses["ok"]:
            raise FloatingPointError(
                f"loss {float(losses['loss'])} or its gradient is not finite after "
                f"{_STEPS + 1} steps: want another config.optim.base_lr"
            )
        rate = self._settings.batch_size / seconds
        _say("step", f"{seconds:.4g} s, {rate:.0f} images/s; loss {losses['loss']:.4g}")
        return seconds

    def _length(self, done: int, pace: _Pace, price: float | None) -> None:
        """Say what the whole run takes."""
        if pace.reading > pace.computing:
            share = 1 - pace.computing / pace.reading
            _say("waiting", f"{share:.0%} of the time for data: more data.workers?")
        left = max(self._plan.stop - done, 0)
        hours = left * pace.step / 3600
        said = f"{left} steps, {hours:.3g} hours without checkpoints and evaluations"
        if price is not None:
            said += f"; at {price:g} an hour {hours * price:.2f}"
        _say("the run", said)


def _for_a_while(batches: Iterator[Any], most: int) -> Iterator[Any]:
    """At most so many batches, and none once the time is up."""
    end = time.monotonic() + _READING
    for batch in itertools.islice(batches, most):
        yield batch
        if time.monotonic() > end:
            return


def _other(config: configs.Tree, workdir: files.Place) -> None:
    """A job that does not train: its runs and their data, and the work directory."""
    settings = configs.build(config)
    if config.job == "eval":
        folders = (settings.run, *settings.also)
        runs = loading.load_all(folders, settings.step, settings.weights)
        evaluations = [settings.eval]
    elif config.job == "compare":
        runs = loading.load_all(settings.runs, settings.step)
        evaluations = list(settings.evaluations.values())
    elif config.job == "explore":
        runs = loading.load_all(settings.runs, settings.step)
        evaluations = []
    else:
        runs, evaluations = {}, []
        _say("study", "the config and the work directory are tried; no cell is")
    try:
        for title, one in runs.items():
            for evaluation in evaluations:
                loading.check(evaluation, one)
            _say("run", f"{title}: its checkpoint is read, its data are there")
    except ValueError as error:
        raise configs.ConfigError(f"config: {error}") from error
    with rundir.claim(workdir, config.job):
        _try_disk(workdir, 0)


def _try_disk(workdir: files.Place, wanted: int) -> None:
    """Write a file, read it back and delete it.

    Args:
        wanted: bytes that should be free.
    Raises:
        DiskError: it cannot be written, is not what was written, or there is no room.
    """
    path = workdir / f"doctor-{jax.process_index()}.tmp"
    content = np.random.default_rng().bytes(_WRITTEN)
    begun = time.monotonic()
    try:
        files.write(path, content)
        wrote = time.monotonic()
        same = files.read(path) == content
        read = time.monotonic()
    except OSError as error:
        raise files.DiskError(f"{path} could not be read: {error}") from error
    finally:
        with contextlib.suppress(OSError, files.DiskError):
            files.remove_file(path)
    if not same:
        raise files.DiskError(f"{path} does not hold what was written to it")
    took = f"written in {wrote - begun:.2g} s and read back in {read - wrote:.2g} s"
    if files.in_bucket(workdir):
        return _say("bucket", f"{_mib(_WRITTEN)} {took}")
    free = shutil.disk_usage(workdir).free
    if free < wanted:
        raise files.DiskError(
            f"workdir={str(workdir)!r}: {_mib(free)} free, and the checkpoints take "
            f"{_mib(wanted)}: want more room, or a smaller config.checkpoint.keep"
        )
    _say("disk", f"{_mib(_WRITTEN)} {took}; {_mib(free)} free")


@contextlib.contextmanager
def _left_as_it_was(workdir: files.Place) -> Iterator[None]:
    """Removes, in the end, the folders and the lock that were not there before."""
    if not isinstance(workdir, pathlib.Path):  # it has no folders, and locks go
        yield
        return
    absent = [one for one in (workdir, *workdir.parents) if not one.exists()]
    locked = (workdir / "lock").exists()
    try:
        yield
    finally:
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                if not locked:
                    (workdir / "lock").unlink()
            for folder in absent:
                with contextlib.suppress(OSError):  # somebody else uses it by now
                    folder.rmdir()


def _memory() -> int:
    """Bytes that a program may use on a device of this host."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    # A CPU: the memory of the machine, for all of its devices.
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return whole // jax.local_device_count()


def _arrays(tree: Any) -> list[Any]:
    """The leaves of a tree of shapes, keys as their words."""
    return jax.tree.leaves(jax.eval_shape(storage.keys_to_words, tree))


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def _say(word: str, text: str) -> None:
    """Print a line on the first host."""
    if jax.process_index() == 0:
        print(f"{word:<11} {text}", flush=True)
