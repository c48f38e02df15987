# SPDX-License-Identifier: Apache-2.0
"""Reads other programs' files of weights: safetensors, torch.save, folders of them.

A file may come from anybody. Reading runs no code of its author, and reads an array
only once somebody asks for it: what a file holds is known before anything large is in
memory.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors

from mim_jax.interop import pickles
from mim_jax.run import files
from mim_jax.schema import ConfigError

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# Where programs keep the parameters in what they save, the first that is there; DINO's
# teacher is the network that its authors evaluate.
_PARTS = ("teacher", "model", "state_dict", "module")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An array of a file, which is read when it is needed.

    Attributes:
        shape: of the array.
        dtype: its name in NumPy, or "bfloat16".
        read: returns the array.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Source:
    """What files of weights hold.

    Attributes:
        name: of the file or folder, for messages.
        tensors: by the names that their program gave them.
        about: the folder's config.json; {} without one.
        images: of the folder's preprocessor_config.json; {} without one.
        args: of the command that trained, where the file has them; else {}.
    """

    name: str
    tensors: dict[str, Tensor]
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    images: dict[str, Any] = dataclasses.field(default_factory=dict)
    args: dict[str, Any] = dataclasses.field(default_factory=dict)


def read(path: str | pathlib.Path) -> Source:
    """What a file, or a folder as Hugging Face has them, holds.

    Args:
        path: a .safetensors file; a file of `torch.save`, whatever its name; or a
            folder with config.json and model.safetensors or pytorch_model.bin, or the
            index of several such files.
    Raises:
        ConfigError: there is nothing that can be read; the message says why.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        return _folder(path)
    tensors, args = _file(path)
    return Source(str(path), tensors, args=args)


def is_folder(path: pathlib.Path) -> bool:
    """Whether a path is a folder that `read` reads."""
    names = (f"{name}{end}" for name in _WEIGHTS for end in ("", ".index.json"))
    return any((path / name).exists() for name in names)


def _folder(folder: pathlib.Path) -> Source:
    tensors: dict[str, Tensor] = {}
    for file in _files(folder):
        tensors |= _file(file)[0]
    about = {
        name: _json(folder / f"{name}.json")
        if (folder / f"{name}.json").exists()
        else {}
        for name in ("config", "preprocessor_config")
    }
    return Source(str(folder), tensors, about["config"], about["preprocessor_config"])


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of a folder that hold its weights."""
    for name in _WEIGHTS:
        if (folder / name).exists():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.exists():
            places = _json(index).get("weight_map")
            if not isinstance(places, dict) or not places:
                raise ConfigError(f"{index} has no weight_map: want an index of files")
            names = sorted({str(one) for one in places.values()})
            if outside := [one for one in names if pathlib.Path(one).name != one]:
                raise ConfigError(
                    f"{index} names {outside[0]!r}: want names of files beside it"
                )
            return [folder / name for name in names]
    raise ConfigError(
        f"{folder} has no weights: want {' or '.join(_WEIGHTS)} there, or its index"
    )


def _json(path: pathlib.Path) -> dict[str, Any]:
    found = files.read_json(path)
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is {type(found).__name__}: want a dict")
    return found


def _file(path: pathlib.Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The arrays of one file, and the arguments that it keeps."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    # A safetensors file begins with the length of its header, which is JSON.
    if path.suffix == ".safetensors" or start[8:] == b"{":
        return _safetensors(path), {}
    return _parameters(path, pickles.load(path, Tensor))


def _safetensors(path: pathlib.Path) -> dict[str, Tensor]:
    try:
        # NumPy alone knows no bfloat16.
        with safetensors.safe_open(path, framework="flax") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {
                name: Tensor(
                    tuple(one.get_shape()),
                    str(one.get_dtype()),
                    functools.partial(_one_of_safetensors, path, name),
                )
                for name, one in slices.items()
            }
    except (OSError, safetensors.SafetensorError, ValueError) as error:
        raise ConfigError(f"{path} is no whole safetensors file: {error}") from error


def _one_of_safetensors(path: pathlib.Path, name: str) -> np.ndarray:
    with safetensors.safe_open(path, framework="flax") as file:
        return np.asarray(file.get_tensor(name))


def _parameters(
    path: pathlib.Path, saved: Any
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The parameters in what `torch.save` wrote, and the arguments beside them."""
    if not isinstance(saved, dict):
        raise ConfigError(f"{path} holds {type(saved).__name__}: want a dict of arrays")
    inner = next((saved[name] for name in _PARTS if _has_tensors(saved, name)), saved)
    tensors = {str(name): one for name, one in inner.items() if isinstance(one, Tensor)}
    args = saved.get("args")
    args = dict(args) if isinstance(args, dict) else {}
    if isinstance(saved.get("arch"), str):  # where MoCo keeps it
        args["arch"] = saved["arch"]
    return tensors, args


def _has_tensors(saved: dict, name: str) -> bool:
    inner = saved.get(name)
    return isinstance(inner, dict) and any(
        isinstance(one, Tensor) for one in inner.values()
    )


def printable(name: str) -> str:
    """A name of a file's author, as messages may show it."""
    return name if name.isprintable() else json.dumps(name, allow_nan=False)


def name_of(source: Source) -> str:
    """The last part of a source's path."""
    return printable(pathlib.Path(source.name).resolve().name)
