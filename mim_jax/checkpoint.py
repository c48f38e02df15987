# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: asynchronous and atomic by Orbax, verified by our own digests.

A checkpoint holds the state with its blocks unstacked, whatever layout training uses,
and JSON beside it. Orbax restores a flipped bit without a word, so a digest of every
leaf is stored and compared; a checkpoint that fails is set aside and the one before it
is used.
"""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

import mim_jax
from mim_jax.sharding import by_path, path_name
from mim_jax.state import stack_blocks, unstack_blocks


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
    """No checkpoint can be used; the message lists each and why."""


class Checkpointer:
    """Saves and restores the states of one run under `workdir/checkpoints`."""

    def __init__(self, workdir: str | pathlib.Path, settings: Checkpoints):
        self.folder = pathlib.Path(workdir).resolve() / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            max_to_keep=settings.keep,
            keep_period=settings.keep_every,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, oldest first, read from the disk."""
        self._manager.reload()
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, extra: dict[str, Any]) -> None:
        """Start saving; returns once the state is copied and may be donated.

        Args:
            state: dataclass of pytrees of arrays, blocks stacked or not.
            extra: plain JSON values.
        """
        state = _per_block(state)
        digests = jax.device_get(_digests(state))
        about = {
            "extra": extra,
            "digests": {name: int(value) for name, value in digests.items()},
            "versions": {
                "mim_jax": mim_jax.__version__,
                "jax": jax.__version__,
                "flax": flax.__version__,
                "optax": optax.__version__,
                "orbax-checkpoint": ocp.__version__,
            },
        }
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_fields(state)),
                about=ocp.args.JsonSave(about),
            ),
            force=True,
        )

    def restore(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest checkpoint that is whole: (step, state, extra); None if none.

        Args:
            like: the state as ShapeDtypeStructs with shardings, stacked or not; the
                result has that layout and is placed so.
        Raises:
            CheckpointError: there are checkpoints, and none can be read.
        """
        failures = []
        for step in reversed(self.steps()):
            try:
                state, extra = self._read(step, like)
            except Exception as error:  # any damage: the one before may be whole
                failures.append(f"step {step}: {_first_line(error)}")
                continue
            for failure, bad in zip(failures, reversed(self.steps())):
                aside = self._set_aside(bad)
                print(f"WARNING: checkpoint {failure}\n  set aside as {aside}")
            return step, state, extra
        if failures:
            raise CheckpointError(
                f"no checkpoint under {self.folder} can be read:\n  "
                + "\n  ".join(failures)
                + "\nDelete the folder to start again, or restore a copy of it."
            )
        return None

    def wait(self) -> None:
        """Until every save is committed; raises what went wrong in the background."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish saving and stop the background threads."""
        self.wait()
        self._manager.close()

    def _read(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        target = jax.eval_shape(unstack_blocks, like)
        mesh = jax.tree.leaves(like)[0].sharding.mesh
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=sharding
            ),
            target,
            by_path(target, mesh),
        )
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(_fields(target)),
                about=ocp.args.JsonRestore(),
            ),
        )
        state = dataclasses.replace(target, **restored["state"])
        _verify(state, restored["about"]["digests"])
        if jax.tree.structure(like) != jax.tree.structure(state):
            shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
            state = jax.jit(stack_blocks, out_shardings=shardings)(state)
        return state, restored["about"]["extra"]

    def _set_aside(self, step: int) -> pathlib.Path:
        aside = self.folder.parent / "damaged-checkpoints" / str(step)
        if jax.process_index() == 0:
            aside.parent.mkdir(exist_ok=True)
            if aside.exists():
                shutil.rmtree(aside)
            (self.folder / str(step)).rename(aside)
        self._manager.reload()
        return aside


def read_params(run: str | pathlib.Path, step: int | None = None) -> tuple[int, Any]:
    """(step, parameters per block) of a run's checkpoint, on the default device.

    Args:
        step: which one; None is the newest.
    Raises:
        FileNotFoundError: the run has no such checkpoint, with those that it has.
        CheckpointError: a leaf does not match its digest.
    """
    folder = pathlib.Path(run).resolve() / "checkpoints"
    found = sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())
    if not found or (step is not None and step not in found):
        raise FileNotFoundError(
            f"no checkpoint {'' if step is None else step} under {folder}; steps there: "
            f"{', '.join(map(str, found)) or 'none'}"
        )
    step = found[-1] if step is None else step
    with ocp.PyTreeCheckpointer() as reader:
        shapes = reader.metadata(folder / str(step) / "state").item_metadata.tree
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
            shapes["params"],
        )
        arguments = ocp.checkpoint_utils.construct_restore_args(target)
        params = reader.restore(
            folder / str(step) / "state",
            args=ocp.args.PyTreeRestore(
                {"params": target},
                restore_args={"params": arguments},
                partial_restore=True,
            ),
        )
    about = json.loads((folder / str(step) / "about" / "metadata").read_text())
    _verify(params, about["digests"])
    return step, params["params"]


def _fields(state: Any) -> dict[str, Any]:
    return {
        field.name: getattr(state, field.name) for field in dataclasses.fields(state)
    }


def _per_block(state: Any) -> Any:
    shapes = jax.eval_shape(unstack_blocks, state)
    if jax.tree.structure(shapes) == jax.tree.structure(state):
        return state
    return _unstack(state)


def _verify(state: Any, stored: dict[str, int]) -> None:
    for name, value in jax.device_get(_digests(state)).items():
        if stored.get(name) != int(value):
            raise CheckpointError(f"leaf {name} does not match its digest")


_unstack = jax.jit(unstack_blocks)


@jax.jit
def _digests(state: Any) -> dict[str, Any]:
    """A 32-bit digest of every leaf, the same for any sharding.

    Words are weighted by odd numbers that depend on their place and summed modulo
    2**32: exact in any order, and every single flipped bit changes the sum.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {path_name(path): _digest(leaf) for path, leaf in leaves}


def _digest(leaf: Any) -> Any:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    width = min(leaf.dtype.itemsize, 4)
    words = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * width}"))
    words = words.astype(jnp.uint32).reshape(-1)
    place = jax.lax.iota(jnp.uint32, words.size) * jnp.uint32(2654435761)
    return jnp.sum(words * (place | jnp.uint32(1)), dtype=jnp.uint32)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
