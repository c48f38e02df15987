# SPDX-License-Identifier: Apache-2.0
"""Our own file of weights: a safetensors file that has the config of its run.

The tensors are named by their paths in the checkpoint, such as
"params/encoder/norm/scale", with blocks unstacked. The metadata say what they are: the
run's config as JSON, the step, and the version that wrote the file.
"""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import safetensors
from flax import traverse_util
from safetensors.numpy import save

import mim_jax
from mim_jax import config as configs
from mim_jax.run import digests, files, rundir, storage
from mim_jax.run.checkpoint import CheckpointError, record_of
from mim_jax.run.parts import read_parts
from mim_jax.schema import to_json

FORMAT = "mim_jax weights 1"
PARTS = ("params", "teacher", "stats", "memory")


def export(
    run: str | files.Place, path: str | pathlib.Path, step: int | None = None
) -> dict[str, Any]:
    """Writes the weights of a run into one file.

    Args:
        run: run directory.
        path: the file, which must end in ".safetensors"; it replaces an older one.
        step: which checkpoint; None is the newest.
    Returns:
        What `inspect` says of the file.
    Raises:
        ConfigError: no training run there, no such checkpoint, or another ending.
        CheckpointError: the checkpoint is damaged.
    """
    folder, path = files.place(run), pathlib.Path(path)
    if path.suffix != ".safetensors":
        raise configs.ConfigError(f"{path}: want a name that ends in .safetensors")
    config = rundir.read_config(folder, f"run={str(run)!r}")
    try:
        step, found = read_parts(folder, step, PARTS)
    except FileNotFoundError as error:
        raise configs.ConfigError(f"run={str(run)!r}: {error}") from error
    leaves = traverse_util.flatten_dict(found, sep="/")
    tensors = {name: np.ascontiguousarray(leaf) for name, leaf in leaves.items()}
    metadata = {
        "format": FORMAT,
        "version": mim_jax.__version__,
        "step": str(step),
        "config": configs.dumps(config),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, save(tensors, metadata))
    return inspect(path)


def is_ours(path: str | pathlib.Path) -> bool:
    """Whether a file says that `export` wrote it, of this version or another."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return (file.metadata() or {}).get("format", "").startswith("mim_jax")
    except (OSError, safetensors.SafetensorError):
        return False


def inspect(path: str | pathlib.Path) -> dict[str, Any]:
    """What a file of weights holds, from its header alone.

    Returns:
        "step" and "version"; "config", the values of the run's config; "shapes", from
        the name of each tensor to its type and shape.
    Raises:
        ConfigError: the file is missing or is no such file.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.keys()}
            shapes = {
                name: [one.get_dtype(), list(one.get_shape())]
                for name, one in slices.items()
            }
    except (OSError, safetensors.SafetensorError) as error:
        raise configs.ConfigError(f"{path} is no safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise configs.ConfigError(
            f"{path} has the format {metadata.get('format')!r}: want {FORMAT!r}, which "
            "`python -m mim_jax.weights export` writes"
        )
    try:
        found = {
            "version": metadata["version"],
            "step": int(metadata["step"]),
            "config": json.loads(metadata["config"]),
            "shapes": shapes,
        }
        _check(found)
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise configs.ConfigError(
            f"{path}: its metadata are damaged ({type(error).__name__}: {error}): want "
            "a file as `python -m mim_jax.weights export` writes it"
        ) from error
    return found


def _check(found: dict[str, Any]) -> None:
    """ValueError unless a file can be made a run of, and printed line by line: anybody
    may have written it."""
    config, names = found["config"], found["shapes"]
    if config["job"] != "train" or not isinstance(config["objective"]["name"], str):
        raise ValueError("its config is not that of a training run")
    if not 0 <= found["step"] < 2**31:
        raise ValueError(f"step={found['step']}")
    for name in names:
        *above, last = name.split("/")
        paths = {"/".join(above[:end]) for end in range(1, len(above) + 1)}
        if (name.split("/")[0] not in PARTS) or not last or paths & names.keys():
            raise ValueError(f"tensor {name!r} is no leaf of a checkpoint")
    for text in (found["version"], config["objective"]["name"], *names):
        if not text.isprintable():
            raise ValueError(f"{text!r} cannot be printed")


def to_run(path: str | pathlib.Path, run: str | files.Place) -> int:
    """Makes a run directory of a file of weights; evaluations and `init_from` read it.

    It has no state of an optimiser, so that training cannot go on from it.

    Args:
        path: the file.
        run: the directory, which must not hold a run yet.
    Returns:
        The step of its only checkpoint.
    Raises:
        ConfigError: the file is none of ours, or there is a run already.
        CheckpointError: the checkpoint cannot be written.
    """
    about, flat = inspect(path), _arrays(path)
    write_run(run, pathlib.Path(path).name, about["step"], about["config"], flat)
    return about["step"]


def read(path: str | pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `inspect` says of a file, and its trees: {"params": ..., ...}.

    Raises:
        ConfigError: as `inspect`.
    """
    return inspect(path), traverse_util.unflatten_dict(_arrays(path), sep="/")


def _arrays(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    with safetensors.safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def write_run(
    run: str | files.Place,
    source: str,
    step: int,
    config: dict[str, Any],
    flat: dict[str, np.ndarray],
) -> None:
    """Makes a run directory whose only checkpoint has no state of an optimiser.

    Args:
        run: the directory, which must not hold a run yet.
        source: where the weights are from.
        step: of the checkpoint.
        config: of the run, as plain JSON values.
        flat: arrays by their paths in a checkpoint.
    Raises:
        ConfigError: there is a run already, or a number is not finite.
        CheckpointError: the checkpoint cannot be written.
    """
    folder = files.place(run)
    if any(files.exists(folder / name) for name in ("config.json", "checkpoints")):
        raise configs.ConfigError(
            f"{folder} holds a run already: want another directory, or an empty one"
        )
    arrays = {name: jax.numpy.asarray(leaf) for name, leaf in flat.items()}
    tree = traverse_util.unflatten_dict(arrays, sep="/")
    sums, finite = jax.device_get(digests.leaf_digests(tree))
    bad = [name for name, fine in finite.items() if not fine]
    if bad:
        raise configs.ConfigError(f"{source}: {digests.name_some(bad)}: not finite")
    extra = {"imported": source, "config": config}
    record = record_of(step, tree, sums, extra)
    with rundir.claim(folder, "train"):
        checkpoints = files.absolute(folder) / "checkpoints"
        files.make(checkpoints)
        writer, failed = storage.Writer(), True
        try:
            writer.start(checkpoints, step, tree, record).result()
            failed = False
        except Exception as error:  # whatever Orbax raises where it cannot write
            raise CheckpointError(
                f"{checkpoints / str(step)} could not be written: "
                f"{digests.first_line(error)}"
            ) from error
        finally:
            writer.close(stay_silent=failed)
        text = to_json(config, indent=2, sort_keys=True) + "\n"
        files.write(folder / "config.json", text)
