# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on the disk: everything that touches Orbax or the checkpoint folders.

A folder has one checkpoint per step: `STEP/state`, the arrays that Orbax wrote, and
`STEP/about/metadata`, our own JSON record of them. Policy (when to save, what to
delete, what to do about damage) is in `mim_jax.run.checkpoint`.
"""

import contextlib
import gc
import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import jax
import orbax.checkpoint as ocp

from mim_jax.run import files
from mim_jax.run.digests import DamageError, first_line, is_key, seal, unseal
from mim_jax.run.hosts import deadline
from mim_jax.schema import DiskError

ORBAX_VERSION: str = ocp.__version__
# In the names of folders that a killed process leaves: Orbax's word, and ours.
_UNFINISHED = (".orbax-checkpoint-tmp", files.GOING)
# The file that Orbax writes last.
_SEAL = "commit_success.txt"
# What Python says of the parts of a save or restore that Orbax gave up.
_DROPPED = ("Event loop is closed", "was never awaited")
_ASYNCIO_LOG, _ABSL_LOG = logging.getLogger("asyncio"), logging.getLogger("absl")


class Writer:
    """Writes checkpoints in background threads; Orbax commits each one atomically.

    From here to `close` Orbax's own messages are silenced, see `OrbaxSilence`.
    """

    def __init__(self):
        # Not Orbax's CheckpointManager: after a failed save it raises for ever, and its
        # list of steps is a memory of the disk, not the disk.
        self._silence = OrbaxSilence().__enter__()
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._waiter = futures.ThreadPoolExecutor(1)

    def start(
        self, folder: files.Place, step: int, tree: Any, record: dict[str, Any]
    ) -> futures.Future:
        """Start writing; return once the arrays are copied and may be donated.

        Args:
            tree: nested dicts of arrays.
            record: plain JSON values.
        Returns:
            A future: done once the checkpoint is committed, or with what failed.
        """
        with jax.transfer_guard("allow"):  # Orbax copies without saying so
            self._orbax.save(
                folder / str(step),
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(keys_to_words(tree)),
                    about=ocp.args.JsonSave(seal(record)),
                ),
            )
        return self._waiter.submit(self._orbax.wait_until_finished)

    def close(self, stay_silent: bool) -> None:
        """Stop the threads; wait for the save under way.

        Args:
            stay_silent: after a failed save Orbax may still be dropping what it began,
                with a traceback for each part: suppress those too.
        """
        self._waiter.shutdown()
        self._orbax.close()
        if stay_silent:
            with _unwarned():
                gc.collect()  # what Orbax dropped
        else:
            self._silence.__exit__()


def steps_on_disk(folder: files.Place) -> list[int]:
    """Steps of the committed checkpoints in a folder, oldest first.

    Raises:
        DiskError: the bucket of the folder does not answer.
    """
    found = [name for name in files.names(folder) if _is_step(name)]
    try:
        done = [n for n in found if ocp.utils.is_checkpoint_finalized(folder / n)]
    except Exception as error:  # whatever the library for buckets raises
        raise DiskError(f"{folder} cannot be read: {first_line(error)}") from error
    return sorted(map(int, done))


def _is_step(name: str) -> bool:
    # As a step is written, and no more than hosts tell each other.
    digits = name.isascii() and name.isdigit() and len(name) <= 10
    return digits and name == str(int(name)) and int(name) < 2**31


def read_record(folder: files.Place, step: int) -> dict[str, Any]:
    """The JSON record beside the arrays of a checkpoint.

    Raises:
        DamageError: it is missing, is not JSON, has changed, or is of another step.
        DiskError: the bucket does not answer.
    """
    try:
        sealed = json.loads(files.read(folder / str(step) / "about" / "metadata"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamageError(first_line(error)) from error
    return unseal(sealed, step)


def read_tree(folder: files.Place, step: int, like: dict) -> dict[str, Any]:
    """The leaves of a checkpoint that `like` names. Their digests are not compared.

    This host reads alone: it waits for no other, which may have failed, or not read.

    Args:
        like: nested dicts of ShapeDtypeStructs with shardings: what to read of the
            state, and where to place it.
    Raises:
        DamageError: Orbax cannot read it.
        DiskError: the bucket does not answer.
    """
    words = jax.eval_shape(keys_to_words, like)
    words = jax.tree.map(
        lambda word, leaf: jax.ShapeDtypeStruct(
            word.shape, word.dtype, sharding=leaf.sharding
        ),
        words,
        like,
    )
    arguments = ocp.args.PyTreeRestore(
        words,
        restore_args=ocp.checkpoint_utils.construct_restore_args(words),
        partial_restore=True,
    )
    failure = ""
    with OrbaxSilence(), _unwarned():
        try:
            with _reader_of_this_host() as reader:
                found = reader.restore(folder / str(step) / "state", args=arguments)
            return words_to_keys(found, like)
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise  # no fault of the file
        except Exception as error:  # Orbax raises whatever its parsers raise
            failure = first_line(error)
        # Collect what Orbax dropped now, while messages about it are suppressed.
        gc.collect()
    files.exists(folder)  # a bucket that does not answer is no damage: this raises
    raise DamageError(failure)


def remove_unfinished(folder: files.Place) -> None:
    """Delete what a killed process was writing or deleting."""
    for name in files.names(folder):
        begun = any(word in name for word in _UNFINISHED)
        # In a bucket Orbax writes to the last name, and the seal at the end.
        if files.in_bucket(folder) and _is_step(name):
            begun = not files.exists(folder / name / _SEAL)
        if begun:
            files.remove(folder / name)


def remove_remains(folder: files.Place) -> None:
    """Where a run directory was moved away while a save was under way, delete what the
    save made anew of it: folders that hold no file but of an unfinished checkpoint."""
    if files.in_bucket(folder):
        return
    # A save that failed leaves threads of TensorStore behind, which may still write.
    gone = 0
    for _ in range(40):
        gone = 0 if folder.exists() else gone + 1
        if gone == 5 or (folder.parent / "lock").exists():
            return
        if folder.exists():
            remove_unfinished(folder)
        for path in (folder, folder.parent):
            with contextlib.suppress(OSError):  # not there, or it holds something else
                path.rmdir()
        time.sleep(0.05)


def delete(folder: files.Place, step: int) -> None:
    """Delete a checkpoint."""
    files.remove(folder / str(step), _SEAL)


def move(folder: files.Place, step: int, where: files.Place) -> None:
    """Move a checkpoint to `where`, instead of what lies there."""
    files.move(folder / str(step), where, _SEAL)


def wait_for_all(name: str, seconds: int) -> None:
    """Return once every host is here.

    By Orbax, since JAX's own barrier keeps the devices busy meanwhile.

    Args:
        name: of the point; no two have the same.
        seconds: after which this process ends, as by `deadline`.
    """
    everyone = set(range(jax.process_count()))
    with deadline(f"all hosts at the point {name!r}", seconds):
        ocp.multihost.sync_global_processes(
            name, timeout=seconds + 60, processes=everyone
        )


def keys_to_words(tree: Any) -> Any:
    """The tree with random keys as arrays of their words.

    Orbax notes in a file of its own that a leaf is a key; without that file it restores
    words and reports nothing.
    """
    return jax.tree.map(
        lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, tree
    )


def words_to_keys(tree: Any, like: Any) -> Any:
    """The inverse of `keys_to_words`; `like` says which leaves are keys."""
    return jax.tree.map(
        lambda leaf, wanted: (
            jax.random.wrap_key_data(leaf, dtype=wanted.dtype)
            if is_key(wanted)
            else leaf
        ),
        tree,
        like,
    )


class OrbaxSilence:
    """Inside this block Orbax logs nothing.

    We report a failed save or restore in one line. Orbax would add hundreds: its log,
    asyncio's errors about tasks that it dropped, and Python's about their event loops.
    """

    def __enter__(self) -> "OrbaxSilence":
        self._hook, self._level = sys.unraisablehook, _ASYNCIO_LOG.level
        sys.unraisablehook = self._unraisable
        _ASYNCIO_LOG.setLevel(logging.CRITICAL)
        _ABSL_LOG.addFilter(self._is_not_orbax)
        return self

    def __exit__(self, *exc) -> None:
        sys.unraisablehook = self._hook
        _ASYNCIO_LOG.setLevel(self._level)
        _ABSL_LOG.removeFilter(self._is_not_orbax)

    def _unraisable(self, unraisable) -> None:
        if not str(unraisable.exc_value).endswith(_DROPPED):
            self._hook(unraisable)

    def _is_not_orbax(self, record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    """Inside this block Python does not warn of coroutines that Orbax dropped."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited")
        yield


def _reader_of_this_host() -> ocp.Checkpointer:
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"host{me}"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)
