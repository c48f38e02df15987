# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on the disk: everything that touches Orbax or the checkpoint folders.

A folder has one checkpoint per step: `STEP/state`, the arrays that Orbax wrote, and
`STEP/about/metadata`, our own JSON record of them. Policy (when to save, what to
delete, what to do about damage) is in `mim_jax.run.checkpoint`.
"""

import gc
import json
import logging
import pathlib
import shutil
import sys
import warnings
from concurrent import futures
from typing import Any

import jax
import orbax.checkpoint as ocp

from mim_jax.run.digests import DamageError, first_line, is_key, seal, unseal

ORBAX_VERSION: str = ocp.__version__
# In the names of folders that a killed process leaves: Orbax's word, and ours.
_UNFINISHED = (".orbax-checkpoint-tmp", ".deleting")
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
        self, folder: pathlib.Path, step: int, tree: Any, record: dict[str, Any]
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
        if not stay_silent:
            self._silence.__exit__()


def steps_on_disk(folder: pathlib.Path) -> list[int]:
    """Steps of the committed checkpoints in a folder, oldest first."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def read_record(folder: pathlib.Path, step: int) -> dict[str, Any]:
    """The JSON record beside the arrays of a checkpoint.

    Raises:
        DamageError: it is missing, is not JSON, has changed, or is of another step.
    """
    try:
        text = (folder / str(step) / "about" / "metadata").read_text()
        sealed = json.loads(text)
    except (OSError, ValueError) as error:
        raise DamageError(first_line(error)) from error
    return unseal(sealed, step)


def read_tree(folder: pathlib.Path, step: int, like: dict) -> dict[str, Any]:
    """The leaves of a checkpoint that `like` names. Their digests are not compared.

    This host reads alone: it waits for no other, which may have failed, or not read.

    Args:
        like: nested dicts of ShapeDtypeStructs with shardings: what to read of the
            state, and where to place it.
    Raises:
        DamageError: Orbax cannot read it.
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
    with OrbaxSilence(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited")
        try:
            with _reader_of_this_host() as reader:
                found = reader.restore(folder / str(step) / "state", args=arguments)
            return words_to_keys(found, like)
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise  # no fault of the file
        except Exception as error:  # Orbax raises whatever its parsers raise
            failure = first_line(error)
        # Collect what Orbax dropped now, while asyncio's messages are suppressed.
        gc.collect()
    raise DamageError(failure)


def remove_unfinished(folder: pathlib.Path) -> None:
    """Delete what a killed process was writing or deleting."""
    for path in folder.iterdir():
        if any(word in path.name for word in _UNFINISHED):
            shutil.rmtree(path, ignore_errors=True)


def delete(folder: pathlib.Path, step: int) -> None:
    """Delete a checkpoint."""
    # Renamed first: a half deleted checkpoint must not look like a whole one.
    going = folder / f"{step}.deleting"
    (folder / str(step)).rename(going)
    shutil.rmtree(going, ignore_errors=True)


def move(folder: pathlib.Path, step: int, where: pathlib.Path) -> None:
    """Move a checkpoint to `where`, instead of what lies there."""
    where.parent.mkdir(exist_ok=True)
    if where.exists():
        shutil.rmtree(where)
    (folder / str(step)).rename(where)


def wait_for_all(name: str, seconds: int) -> None:
    """Return once every host is here; raise after so many seconds without one.

    By Orbax, since JAX's own barrier has no timeout that can be set.
    """
    everyone = set(range(jax.process_count()))
    ocp.multihost.sync_global_processes(name, timeout=seconds, processes=everyone)


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
        if str(unraisable.exc_value) != "Event loop is closed":
            self._hook(unraisable)

    def _is_not_orbax(self, record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname


def _reader_of_this_host() -> ocp.Checkpointer:
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"host{me}"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)
