# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: when to save, what to keep, what to do about damage.

A checkpoint holds the state with its blocks unstacked, whatever layout training uses,
and a JSON record beside it. Saving is asynchronous and atomic. Restoring compares the
digest of every leaf; a checkpoint that fails is set aside, and the one before it is
used.
"""

import dataclasses
import sys
from collections.abc import Callable
from concurrent import futures
from typing import Any, TypeVar

import flax
import jax
import optax

import mim_jax
from mim_jax.run import digests, files, storage
from mim_jax.run.digests import DamageError
from mim_jax.run.hosts import deadline, from_first_host, from_hosts
from mim_jax.run.interrupt import Interrupted
from mim_jax.schema import DiskError, check_ranges, within
from mim_jax.sharding import by_path
from mim_jax.state import stack_blocks, unstack_blocks

_FAILURES = 3  # saves that may fail one after the other before the run stops
_LINES = 8  # lines of differences in a message, at most
_LIST = "the list of checkpoints"

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """When to save, and which checkpoints to keep.

    Attributes:
        every: steps between checkpoints; the last step is always saved.
        keep: how many of the newest ones to keep, at least 1. The newest one whose step
            is a multiple of `every` is kept in any case.
        keep_every: besides, keep those whose step is a multiple of this for good.
    """

    every: int = within(1000, least=1)
    keep: int = within(2, least=1)
    keep_every: int | None = within(None, least=1)

    def __post_init__(self):
        check_ranges(self)


class CheckpointError(RuntimeError):
    """Nothing can be restored, or nothing can be saved; the message says why."""


class MismatchError(ValueError):
    """The checkpoint is whole, but of another model or optimiser; names the leaves."""


class Checkpointer:
    """Saves and restores the states of one run under `workdir/checkpoints`.

    Use it in a `with` block. Leaving the block waits for the save under way, and raises
    CheckpointError if the last state is not on the disk, unless another error is
    already on its way.

    Args:
        workdir: run directory.
        settings: when to save, and what to keep.
        check: called before anything is written: raises if the directory is gone.

    Example:
        >>> with Checkpointer("runs/mine", Checkpoints(every=100)) as checkpointer:
        ...     checkpointer.save(100, state, extra={"note": "any JSON values"})
        >>> shapes = jax.tree.map(
        ...     lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        ...     state,
        ... )
        >>> with Checkpointer("runs/mine", Checkpoints(every=100)) as checkpointer:
        ...     step, state, extra = checkpointer.restore(shapes)
        >>> step, extra
        (100, {'note': 'any JSON values'})
    """

    def __init__(
        self,
        workdir: str | files.Place,
        settings: Checkpoints,
        check: Callable[[], None] = lambda: None,
    ):
        self.folder = files.absolute(files.place(workdir)) / "checkpoints"
        self._settings, self._check = settings, check
        self._first_host = jax.process_index() == 0
        if self._first_host:
            files.make(self.folder, parents=True)
            storage.remove_unfinished(self.folder)
        self._writer = storage.Writer()
        self._saving: tuple[int, futures.Future] | None = None
        self._failures = 0  # saves that failed since the last one that did not
        self._failure = ""  # what to say of the last one that failed

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.close()
        except CheckpointError:
            if error is None or isinstance(error, Interrupted):
                raise
        finally:
            if isinstance(error, DiskError) and self._first_host:
                storage.remove_remains(self.folder)

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, oldest first, read from the disk."""
        return storage.steps_on_disk(self.folder)

    def newest(self) -> int | None:
        """The newest committed step, after waiting for the save under way."""
        self._finish_save()
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any, extra: dict[str, Any]) -> None:
        """Start saving; return once the state is copied and may be donated.

        Args:
            state: dataclass of pytrees of arrays, blocks stacked or not.
            extra: plain JSON values, which `restore` returns.
        Raises:
            FloatingPointError: a leaf is not finite; nothing was saved.
            DiskError: as `check` raises it; nothing was saved.
            CheckpointError: this is the third save in a row that failed. After fewer
                failures there is a warning, and training goes on.
        """
        self._check()
        self._finish_save()
        if step in from_first_host(self.steps(), _LIST):
            return  # A run that is interrupted twice before its first step.
        state = _unstacked(state)
        with deadline(f"the digests of step {step}"):
            sums, finite = jax.device_get(digests.leaf_digests(state))
        bad = [name for name, fine in finite.items() if not fine]
        if bad:
            raise FloatingPointError(
                f"step {step}: {digests.name_some(bad)}: not finite, so the state was "
                f"not saved. Last good checkpoint: {self._newest_on_disk()}."
            )
        record = record_of(step, state, sums, extra)
        try:
            with deadline(f"the start of the checkpoint of step {step}"):
                committed = self._writer.start(
                    self.folder, step, _fields(state), record
                )
        except Exception as error:
            self._count_failure(step, error)
        else:
            self._saving = (step, committed)

    def poll(self) -> None:
        """Report what became of the last save, if that is known by now; never wait.

        Raises:
            CheckpointError: as in `save`.
        """
        if self._saving is not None and self._saving[1].done():
            self._finish_save()

    def restore(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest undamaged checkpoint: (step, state, extra); None if there is none.

        Damaged checkpoints that are newer are moved to `workdir/damaged-checkpoints`,
        with a warning. If all are damaged, nothing is moved.

        Args:
            like: the state as ShapeDtypeStructs with shardings, blocks stacked or not.
                The result has that layout and those shardings.
        Raises:
            CheckpointError: there are checkpoints, and none can be read.
            MismatchError: the newest undamaged one has other leaves than `like`.
        """
        damaged = {}
        for step in reversed(from_first_host(self.steps(), _LIST)):
            try:
                state, extra = self._read(step, like)
            except DamageError as error:
                damaged[step] = str(error)
                continue
            for bad, why in damaged.items():
                self._set_aside(bad, why, step)
            return step, state, extra
        if damaged:
            raise CheckpointError(
                f"no checkpoint under {self.folder} can be read:\n  "
                + "\n  ".join(f"step {step}: {why}" for step, why in damaged.items())
                + "\nNothing was changed. Put a copy of one there, or delete the "
                "folder to start again."
            )
        return None

    def go_back(self) -> None:
        """Delete the checkpoints after the newest one whose step is a multiple of
        `every`: those that a run saved when it was asked to leave. So it goes back to
        the same one, however often that happened."""
        self._finish_save()
        steps = from_first_host(self.steps(), _LIST)
        regular = [step for step in steps if step % self._settings.every == 0]
        for step in steps:
            if self._first_host and step > max(regular, default=0):
                storage.delete(self.folder, step)
        # No host reads before the first one is done.
        from_hosts(0, "the return to an older checkpoint")

    def close(self) -> None:
        """Wait for the save under way and stop the background threads.

        Raises:
            CheckpointError: the newest state could not be saved.
        """
        try:
            self._finish_save()
        finally:
            self._writer.close(stay_silent=bool(self._failure))
        if self._failures:
            raise CheckpointError(self._failure)

    def _finish_save(self) -> None:
        if self._saving is None:
            return
        (step, committed), self._saving = self._saving, None
        try:
            with deadline(f"the checkpoint of step {step} to be written"):
                committed.result()
        except Exception as error:
            self._count_failure(step, error)
        else:
            self._failures = 0
            self._delete_old()

    def _count_failure(self, step: int, error: Exception) -> None:
        self._failures += 1
        self._failure = (
            f"the checkpoint of step {step} could not be saved: "
            f"{digests.first_line(error)}\n"
            f"Newest one on the disk: {self._newest_on_disk()}. Is the disk full, or "
            "gone?"
        )
        if self._failures == _FAILURES:
            raise CheckpointError(f"{_FAILURES} times in a row, {self._failure}")
        print(f"WARNING: {self._failure}", file=sys.stderr, flush=True)

    def _newest_on_disk(self) -> str:
        return f"step {self.steps()[-1]}" if self.steps() else "none yet"

    def _delete_old(self) -> None:
        """Apply `keep` and `keep_every`; called only once the newest is committed."""
        try:
            self._check()
        except DiskError:  # another run's checkpoints may lie there by now
            return
        period, steps = self._settings.keep_every, self.steps()
        regular = [s for s in steps if s and s % self._settings.every == 0]
        for step in steps[: -self._settings.keep]:
            kept = step in regular[-1:] or (period and step and step % period == 0)
            if self._first_host and not kept:
                storage.delete(self.folder, step)

    def _read(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        record = _if_every_host(lambda: storage.read_record(self.folder, step))
        if "imported" in record["extra"]:
            raise MismatchError(
                f"the weights of {self.folder.parent} were imported from "
                f"{record['extra']['imported']}, without an optimiser's state, so "
                "training cannot go on from them: want a new --workdir and "
                f"--config.init_from.run={self.folder.parent}"
            )
        wanted = jax.eval_shape(unstack_blocks, like)
        _check_same_leaves(step, record["leaves"], digests.leaf_types(wanted))
        mesh = jax.tree.leaves(like)[0].sharding.mesh
        wanted = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=sharding
            ),
            wanted,
            by_path(wanted, mesh),
        )
        fields = _if_every_host(
            lambda: storage.read_tree(self.folder, step, _fields(wanted))
        )
        state = dataclasses.replace(wanted, **fields)
        with deadline(f"the digests of step {step}"):
            digests.check_leaves(state, record["leaves"])
        if jax.tree.structure(like) != jax.tree.structure(state):
            shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
            state = jax.jit(stack_blocks, out_shardings=shardings)(state)
        return state, record["extra"]

    def _set_aside(self, step: int, why: str, instead: int) -> None:
        if not self._first_host:
            return
        aside = self.folder.parent / "damaged-checkpoints" / str(step)
        storage.move(self.folder, step, aside)
        print(
            f"WARNING: the checkpoint of step {step} is damaged: {why}\n"
            f"  set aside as {aside}; going back to step {instead}",
            file=sys.stderr,
            flush=True,
        )


def record_of(
    step: int, state: Any, sums: dict[str, Any], extra: dict[str, Any]
) -> dict[str, Any]:
    """The JSON record beside the arrays of a checkpoint.

    Args:
        state: pytree of arrays, blocks unstacked.
        sums: digest of each leaf by its name, on the host.
        extra: plain JSON values; "imported" says that the state has no optimiser.
    """
    return {
        "step": step,
        "extra": extra,
        "leaves": {
            name: [*leaf, int(sums[name])]
            for name, leaf in digests.leaf_types(state).items()
        },
        "versions": {
            "mim_jax": mim_jax.__version__,
            "jax": jax.__version__,
            "flax": flax.__version__,
            "optax": optax.__version__,
            "orbax-checkpoint": storage.ORBAX_VERSION,
        },
    }


def _if_every_host(read: Callable[[], _T]) -> _T:
    """What `read` returns on this host, if it returns on every host.

    All hosts must call this at the same point.

    Raises:
        DamageError: it raised DamageError on one of them.
    """
    found, failure = None, ""
    try:
        found = read()
    except DamageError as error:
        failure = str(error)
    failed = from_hosts(bool(failure), "whether a checkpoint can be read")
    if any(failed):
        raise DamageError(failure or f"host {failed.index(1)} could not read it")
    return found  # pyright: ignore[reportReturnType]  # it was read


def _check_same_leaves(
    step: int, stored: dict[str, list], wanted: dict[str, list]
) -> None:
    lines = digests.differences(stored, wanted)
    if lines:
        more = f"\n  ... and {len(lines) - _LINES} more" if len(lines) > _LINES else ""
        raise MismatchError(
            f"the checkpoint of step {step} is not of this model and optimiser "
            "(saved -> wanted):\n  "
            + "\n  ".join(lines[:_LINES])
            + more
            + "\nNothing was changed. Take the run's own config, or another --workdir."
        )


def _fields(state: Any) -> dict[str, Any]:
    """The fields of a dataclass, not copied."""
    return {
        field.name: getattr(state, field.name) for field in dataclasses.fields(state)
    }


def _unstacked(state: Any) -> Any:
    """The state with its blocks unstacked, each leaf sharded by its own path."""
    shapes = jax.eval_shape(unstack_blocks, state)
    if jax.tree.structure(shapes) == jax.tree.structure(state):
        return state
    placed = by_path(shapes, jax.tree.leaves(state)[0].sharding.mesh)
    return jax.jit(unstack_blocks, out_shardings=placed)(state)
