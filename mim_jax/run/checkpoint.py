# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: asynchronous and atomic by Orbax, verified by our own digests.

A checkpoint holds the state with its blocks unstacked, whatever layout training uses,
and JSON beside it. Orbax restores a flipped bit without a word, so a digest of every
leaf is stored and compared; a checkpoint that fails is set aside and the one before it
is used.
"""

import dataclasses
import gc
import hashlib
import json
import logging
import pathlib
import shutil
import sys
import warnings
from collections.abc import Callable
from concurrent import futures
from typing import Any, TypeVar

import flax
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import traverse_util

import mim_jax
from mim_jax.run.interrupt import Interrupted
from mim_jax.sharding import by_path, from_first_host, from_hosts, path_name
from mim_jax.state import stack_blocks, unstack_blocks

_FAILURES = 3  # saves that may fail one after the other before the run stops
_UNFINISHED = (".orbax-checkpoint-tmp", ".deleting")  # left by a killed process
_ASYNCIO_LOG, _ABSL_LOG = logging.getLogger("asyncio"), logging.getLogger("absl")
_SHOWN = 8  # leaves named in a message

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """When to save and what to keep.

    Attributes:
        every: steps between checkpoints; the last step is always saved.
        keep: newest ones to keep, at least 1.
        keep_every: besides, keep those whose step is a multiple of this for good.
    """

    every: int = 1000
    keep: int = 2
    keep_every: int | None = None

    def __post_init__(self):
        if self.every < 1 or self.keep < 1:
            raise ValueError(f"every={self.every}, keep={self.keep}: want at least 1")
        if self.keep_every is not None and self.keep_every < 1:
            raise ValueError(f"keep_every={self.keep_every}: want at least 1 step")


class CheckpointError(RuntimeError):
    """Nothing can be restored, or nothing can be saved; the message says why."""


class MismatchError(ValueError):
    """A sound checkpoint of another model or optimiser; the message names leaves."""


class _DamageError(Exception):
    """This checkpoint is not what was saved."""


class Checkpointer:
    """Saves and restores the states of one run under `workdir/checkpoints`.

    Leaving a `with` block finishes saving; it raises CheckpointError if the last state
    is not on the disk, unless another error is under way.
    """

    def __init__(self, workdir: str | pathlib.Path, settings: Checkpoints):
        self.folder = pathlib.Path(workdir).resolve() / "checkpoints"
        self._settings = settings
        self._first = jax.process_index() == 0
        if self._first:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.iterdir():
                if any(word in path.name for word in _UNFINISHED):
                    shutil.rmtree(path, ignore_errors=True)
        # Not Orbax's CheckpointManager: after a failed save it raises for ever, and its
        # list of steps is a memory of the disk, not the disk.
        self._quiet = _Quiet().__enter__()
        self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._waiter = futures.ThreadPoolExecutor(1)
        self._saving: tuple[int, futures.Future] | None = None
        self._failures, self._failure = 0, ""

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.close()
        except CheckpointError:
            if error is None or isinstance(error, Interrupted):
                raise

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, oldest first, read from the disk."""
        return _steps(self.folder)

    def newest(self) -> int | None:
        """The newest committed checkpoint, after finishing the save under way."""
        self._finish()
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any, extra: dict[str, Any]) -> None:
        """Start saving; returns once the state is copied and may be donated.

        Args:
            state: dataclass of pytrees of arrays, blocks stacked or not.
            extra: plain JSON values.
        Raises:
            FloatingPointError: a leaf is not finite; nothing was saved.
            CheckpointError: this is the third save in a row that failed; after fewer
                there is a warning, and training goes on.
        """
        self._finish()
        if step in from_first_host(self.steps()):
            return  # A run that is interrupted twice before its first step.
        state = _per_block(state)
        digests, finite = jax.device_get(_digests(state))
        bad = [name for name, fine in finite.items() if not fine]
        if bad:
            raise FloatingPointError(
                f"step {step}: {_listed(bad)}: not finite, so the state was not "
                f"saved. Last good checkpoint: {self._kept()}."
            )
        about = {
            "step": step,
            "extra": extra,
            "leaves": {
                name: [*leaf, int(digests[name])]
                for name, leaf in _shapes(state).items()
            },
            "versions": {
                "mim_jax": mim_jax.__version__,
                "jax": jax.__version__,
                "flax": flax.__version__,
                "optax": optax.__version__,
                "orbax-checkpoint": ocp.__version__,
            },
        }
        try:
            with jax.transfer_guard("allow"):  # Orbax copies without saying so
                self._writer.save(
                    self.folder / str(step),
                    args=ocp.args.Composite(
                        state=ocp.args.PyTreeSave(_raw(_fields(state))),
                        about=ocp.args.JsonSave(_sealed(about)),
                    ),
                )
        except Exception as error:
            self._failed(step, error)
        else:
            committed = self._waiter.submit(self._writer.wait_until_finished)
            self._saving = (step, committed)

    def poll(self) -> None:
        """Tell what became of the last save, if that is known by now; never waits.

        Raises:
            CheckpointError: as in `save`.
        """
        if self._saving is not None and self._saving[1].done():
            self._finish()

    def restore(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest checkpoint that is whole: (step, state, extra); None if none.

        Args:
            like: the state as ShapeDtypeStructs with shardings, stacked or not; the
                result has that layout and is placed so.
        Raises:
            CheckpointError: there are checkpoints, and none can be read.
            MismatchError: the newest whole one has other leaves than `like`.
        """
        damaged = {}
        for step in reversed(from_first_host(self.steps())):
            try:
                state, extra = self._read(step, like)
            except _DamageError as error:
                damaged[step] = str(error)
                continue
            for bad, why in damaged.items():
                aside = self._set_aside(bad)
                if self._first:
                    print(
                        f"WARNING: the checkpoint of step {bad} is damaged: {why}\n"
                        f"  set aside as {aside}; going back to step {step}",
                        file=sys.stderr,
                        flush=True,
                    )
            return step, state, extra
        if damaged:
            raise CheckpointError(
                f"no checkpoint under {self.folder} can be read:\n  "
                + "\n  ".join(f"step {step}: {why}" for step, why in damaged.items())
                + "\nNothing was changed. Put a copy of one there, or delete the "
                "folder to start again."
            )
        return None

    def close(self) -> None:
        """Finish saving and stop the background threads.

        Raises:
            CheckpointError: the newest state could not be saved.
        """
        try:
            self._finish()
        finally:
            self._waiter.shutdown()
            self._writer.close()
            if not self._failure:  # else Orbax may still be dropping what it began
                self._quiet.__exit__()
        if self._failures:
            raise CheckpointError(self._failure)

    def _finish(self) -> None:
        if self._saving is None:
            return
        (step, committed), self._saving = self._saving, None
        try:
            committed.result()
        except Exception as error:
            self._failed(step, error)
        else:
            self._failures = 0
            self._drop_old()

    def _failed(self, step: int, error: Exception) -> None:
        self._failures += 1
        self._failure = (
            f"the checkpoint of step {step} could not be saved: {_first_line(error)}\n"
            f"Newest one on the disk: {self._kept()}. Is the disk full, or gone?"
        )
        if self._failures == _FAILURES:
            raise CheckpointError(f"{_FAILURES} times in a row, {self._failure}")
        print(f"WARNING: {self._failure}", file=sys.stderr, flush=True)

    def _kept(self) -> str:
        return f"step {self.steps()[-1]}" if self.steps() else "none yet"

    def _drop_old(self) -> None:
        """Delete what need not be kept; called only when the newest is committed."""
        period = self._settings.keep_every
        for step in self.steps()[: -self._settings.keep]:
            if self._first and not (period and step and step % period == 0):
                # Renamed first: a half deleted checkpoint must not look like one.
                going = self.folder / f"{step}.deleting"
                (self.folder / str(step)).rename(going)
                shutil.rmtree(going, ignore_errors=True)

    def _read(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        about = _by_all(lambda: _about(self.folder, step))
        target = jax.eval_shape(unstack_blocks, like)
        _compare(step, about["leaves"], _shapes(target))
        mesh = jax.tree.leaves(like)[0].sharding.mesh
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=sharding
            ),
            target,
            by_path(target, mesh),
        )
        fields = _by_all(lambda: _restored(self.folder, step, _fields(target)))
        state = dataclasses.replace(target, **fields)
        _verify(state, about["leaves"])
        if jax.tree.structure(like) != jax.tree.structure(state):
            shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
            state = jax.jit(stack_blocks, out_shardings=shardings)(state)
        return state, about["extra"]

    def _set_aside(self, step: int) -> pathlib.Path:
        aside = self.folder.parent / "damaged-checkpoints" / str(step)
        if self._first:
            aside.parent.mkdir(exist_ok=True)
            if aside.exists():
                shutil.rmtree(aside)
            (self.folder / str(step)).rename(aside)
        return aside


def wait_for_all(name: str, seconds: int) -> None:
    """Returns once every host is here; an error after so many seconds without one."""
    everyone = set(range(jax.process_count()))
    ocp.multihost.sync_global_processes(name, timeout=seconds, processes=everyone)


def read_parts(
    run: str | pathlib.Path,
    step: int | None = None,
    parts: tuple[str, ...] = ("params",),
) -> tuple[int, dict[str, Any]]:
    """(step, {part: tree}) of a run's checkpoint, per block, on the default device.

    Args:
        step: which one; None is the newest.
        parts: fields of TrainState; {} where the state had nothing there.
    Raises:
        FileNotFoundError: the run has no such checkpoint, with those that it has.
        CheckpointError: it is damaged.
    """
    folder = pathlib.Path(run).resolve() / "checkpoints"
    found = _steps(folder)
    if not found or (step is not None and step not in found):
        raise FileNotFoundError(
            f"no checkpoint {'' if step is None else step} under {folder}; steps "
            f"there: {', '.join(map(str, found)) or 'none'}"
        )
    step = found[-1] if step is None else step
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        leaves = _about(folder, step)["leaves"]
        target = {
            tuple(name.split("/")): jax.ShapeDtypeStruct(shape, dtype, sharding=device)
            for name, (dtype, shape, _) in leaves.items()
            if name.split("/")[0] in parts
        }
        target = traverse_util.unflatten_dict(target)
        state = _restored(folder, step, target)
        _verify(state, leaves)
    except _DamageError as error:
        raise CheckpointError(
            f"checkpoint {step} under {folder} is damaged: {error}\nSteps there: "
            f"{', '.join(map(str, found))}"
        ) from error
    return step, {part: state.get(part, {}) for part in parts}


def _steps(folder: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def _about(folder: pathlib.Path, step: int) -> dict[str, Any]:
    """What `save` wrote beside the state."""
    try:
        sealed = json.loads((folder / str(step) / "about" / "metadata").read_text())
        about = sealed["about"]
        intact = _sealed(about) == sealed and about["step"] == step
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _DamageError(_first_line(error)) from error
    if not intact:
        raise _DamageError("about/metadata does not match its digest")
    return about


def _sealed(about: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(about, sort_keys=True)
    return {"about": about, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _restored(folder: pathlib.Path, step: int, target: dict) -> dict[str, Any]:
    """The named part of a state, placed as `target` says; not verified."""
    raw = jax.eval_shape(_raw, target)
    raw = jax.tree.map(
        lambda raw, leaf: jax.ShapeDtypeStruct(
            raw.shape, raw.dtype, sharding=leaf.sharding
        ),
        raw,
        target,
    )
    arguments = ocp.args.PyTreeRestore(
        raw,
        restore_args=ocp.checkpoint_utils.construct_restore_args(raw),
        partial_restore=True,
    )
    failure = ""
    with _Quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited")
        try:
            with _reader() as reader:
                found = reader.restore(folder / str(step) / "state", args=arguments)
            return _typed(found, target)
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise  # no fault of the file
        except Exception as error:  # Orbax raises whatever its parsers do
            failure = _first_line(error)
        gc.collect()  # asyncio tells of what Orbax dropped: now, while nobody listens
    raise _DamageError(failure)


def _reader() -> ocp.Checkpointer:
    """Of this host alone: it waits for no other, which may have failed, or not read."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"host{me}"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _by_all(read: Callable[[], _T]) -> _T:
    """What `read` returns here, if it returns on every host.

    Raises:
        _DamageError: on one it did not.
    """
    found, failure = None, ""
    try:
        found = read()
    except _DamageError as error:
        failure = str(error)
    failed = from_hosts(bool(failure))
    if any(failed):
        raise _DamageError(failure or f"host {failed.index(1)} could not read it")
    return found  # pyright: ignore[reportReturnType]  # read


class _Quiet:
    """We tell of a failed save or restore in one line: in here Orbax, and what it
    leaves to asyncio and Python, tell nothing (else hundreds of tracebacks)."""

    def __enter__(self) -> "_Quiet":
        self._hook, self._level = sys.unraisablehook, _ASYNCIO_LOG.level
        sys.unraisablehook = self._unraisable
        _ASYNCIO_LOG.setLevel(logging.CRITICAL)
        _ABSL_LOG.addFilter(self._allows)
        return self

    def __exit__(self, *exc) -> None:
        sys.unraisablehook = self._hook
        _ASYNCIO_LOG.setLevel(self._level)
        _ABSL_LOG.removeFilter(self._allows)

    def _unraisable(self, unraisable) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self._hook(unraisable)

    def _allows(self, record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname


def _raw(tree: Any) -> Any:
    """Random keys as the words that they are: that a leaf is a key, Orbax keeps in a
    file of its own, without which it restores words and says nothing."""
    return jax.tree.map(
        lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree
    )


def _typed(raw: Any, like: Any) -> Any:
    return jax.tree.map(
        lambda leaf, wanted: (
            jax.random.wrap_key_data(leaf, dtype=wanted.dtype)
            if _is_key(wanted)
            else leaf
        ),
        raw,
        like,
    )


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _verify(state: Any, stored: dict[str, list]) -> None:
    leaves = {
        path_name(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    # A leaf that Orbax does not find, it returns as the shape that it was asked for.
    bad = [
        name
        for name, leaf in leaves.items()
        if not isinstance(leaf, jax.Array) or stored[name][:2] != _shape(leaf)
    ]
    if not bad:
        digests, _ = jax.device_get(_digests(state))
        bad = [name for name, value in digests.items() if stored[name][2] != int(value)]
    if bad:
        raise _DamageError(f"{_listed(bad)}: not the bytes that were saved")


def _compare(step: int, stored: dict[str, list], wanted: dict[str, list]) -> None:
    """Raises MismatchError where the leaves are not those of the model."""
    lines = []
    for name in sorted(stored.keys() | wanted.keys()):
        before = stored[name][:2] if name in stored else None
        if before != (now := wanted.get(name)):
            texts = ("absent" if x is None else f"{x[0]}{x[1]}" for x in (before, now))
            lines.append("{}: {} -> {}".format(name, *texts))
    if lines:
        more = f"\n  ... and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        raise MismatchError(
            f"the checkpoint of step {step} is not of this model and optimiser "
            "(saved -> wanted):\n  "
            + "\n  ".join(lines[:_SHOWN])
            + more
            + "\nNothing was changed. Take the run's own config, or another --workdir."
        )


def _shapes(state: Any) -> dict[str, list]:
    """[type, shape] of every leaf by name, as JSON gives them back."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {path_name(path): _shape(leaf) for path, leaf in leaves}


def _shape(leaf: Any) -> list:
    return [str(leaf.dtype), list(leaf.shape)]


def _fields(state: Any) -> dict[str, Any]:
    return {
        field.name: getattr(state, field.name) for field in dataclasses.fields(state)
    }


def _per_block(state: Any) -> Any:
    shapes = jax.eval_shape(unstack_blocks, state)
    if jax.tree.structure(shapes) == jax.tree.structure(state):
        return state
    placed = by_path(shapes, jax.tree.leaves(state)[0].sharding.mesh)
    return jax.jit(unstack_blocks, out_shardings=placed)(state)


@jax.jit
def _digests(state: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A 32-bit digest of every leaf, the same for any sharding, and whether all of its
    numbers are finite.

    Words are weighted by odd numbers that depend on their place and summed modulo
    2**32: exact in any order, and every single flipped bit changes the sum.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state)
    digests = {path_name(path): _digest(leaf) for path, leaf in leaves}
    finite = {
        path_name(path): jnp.isfinite(leaf).all()
        for path, leaf in leaves
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    return digests, finite


def _digest(leaf: Any) -> Any:
    if _is_key(leaf):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    width = min(leaf.dtype.itemsize, 4)
    words = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * width}"))
    # The place in row-major order, axis by axis: flattening would gather the shards.
    place, stride = jnp.uint32(0), 1
    for axis in reversed(range(words.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place = place + along * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    weight = (place * jnp.uint32(2654435761)) | jnp.uint32(1)
    return jnp.sum(words.astype(jnp.uint32) * weight, dtype=jnp.uint32)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
