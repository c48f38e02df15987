# SPDX-License-Identifier: Apache-2.0
"""Reads what `torch.save` wrote, and runs no code of it.

A pickle is a program: it may name any function and have it called. So it is read by
`torch.load(weights_only=True)` where torch is installed, and else by a reader of our
own that knows the names below and no others.
"""

import argparse
import collections
import functools
import importlib.util
import io
import math
import pathlib
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from mim_jax.schema import ConfigError

# Bytes of the pickle itself, in which the arrays are not; a ViT has some 100,000.
_MOST = 2**26
_REMEMBERS = ("PUT", "BINPUT", "LONG_BINPUT")
_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}

Make = Callable[[tuple[int, ...], str, Callable[[], np.ndarray]], Any]


def load(path: pathlib.Path, make: Make) -> Any:
    """The plain data of a file: numbers, texts, lists, dicts, and arrays.

    An argparse.Namespace is read as a dict.

    Args:
        make: makes an array of (shape, dtype, function that reads it).
    Raises:
        ConfigError: the file is none of `torch.save`, is damaged, or holds anything
            else.
    """
    by_torch = importlib.util.find_spec("torch") is not None
    try:
        return (_by_torch if by_torch else _by_ourselves)(path, make)
    except ConfigError:
        raise
    except Exception as error:  # a damaged file has any of them raised
        why = "".join(filter(str.isprintable, (str(error).splitlines() or [""])[0]))
        raise ConfigError(
            f"{path} cannot be read as a file of weights ({type(error).__name__}: "
            f"{why}): want a whole file of torch.save or safetensors, with nothing but "
            "arrays and plain values in it"
        ) from error


def _by_torch(path: pathlib.Path, make: Make) -> Any:
    import torch  # pyright: ignore[reportMissingImports]

    # A dict that is in a file once may be in others twice each, and these too: a copy
    # for each place would fill the memory.
    copies: dict[int, Any] = {}

    def plain(value: Any) -> Any:
        if id(value) not in copies:
            copies[id(value)] = copy_of(value)
        return copies[id(value)]

    def copy_of(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            kind = str(value.dtype).removeprefix("torch.")
            return make(tuple(value.shape), kind, lambda: _to_numpy(value))
        if isinstance(value, argparse.Namespace):
            value = vars(value)
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items()}
        return value

    def _to_numpy(value: Any) -> np.ndarray:
        value = value.detach()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()

    mapped = zipfile.is_zipfile(path)
    how: dict[str, Any] = dict(map_location="cpu", weights_only=True, mmap=mapped)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            saved = torch.load(path, **how)
    except pickle.UnpicklingError as error:
        # Torch's own message says how to read such a file all the same.
        if (found := re.search(r"GLOBAL ([\w.]+)", str(error))) is not None:
            raise _refused(path, found[1]) from None
        raise
    return plain(saved)


def _refused(path: pathlib.Path, name: str) -> ConfigError:
    return ConfigError(
        f"{path} names {name!r}, which is no array and no plain value, so that reading "
        "it could run code: want a file of arrays, numbers and texts alone"
    )


def _by_ourselves(path: pathlib.Path, make: Make) -> Any:
    if not zipfile.is_zipfile(path):
        raise ConfigError(
            f"{path} is no zip file, as torch.save writes them: want one, or a "
            "safetensors file; files of torch before 1.6, if it is one, are read where "
            "torch is installed"
        )
    with zipfile.ZipFile(path) as archive:
        found = [one for one in archive.namelist() if one.endswith("data.pkl")]
        if len(found) != 1:
            raise ValueError(f"{len(found)} entries data.pkl in the zip file, not 1")
        sizes = {one.filename: one.file_size for one in archive.infolist()}
        packed = any(one.compress_type for one in archive.infolist())
        if packed or sum(sizes.values()) > path.stat().st_size:
            raise ValueError("entries of the zip file are larger than the file")
        if sizes[found[0]] > _MOST:
            raise ValueError(f"data.pkl has {sizes[found[0]]} bytes: more than {_MOST}")
        text = archive.read(found[0])
        _check_memo(text)
        folder = found[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in sizes and archive.read(f"{folder}byteorder") != (
            b"little"
        ):
            raise ValueError("its numbers are big-endian")
    return _Reader(text, path, f"{folder}data/", sizes, make).load()


def _check_memo(text: bytes) -> None:
    """ValueError if the pickle numbers what it remembers higher than it has bytes.
    Python's reader makes a table as long as the highest number: 30 bytes could ask for
    64 GiB."""
    for code, number, _ in pickletools.genops(text):
        if code.name in _REMEMBERS and int(number or 0) >= len(text):
            raise ValueError(f"data.pkl of {len(text)} bytes remembers number {number}")


class _Reader(pickle.Unpickler):
    """An unpickler that knows the names of `_known` and no others."""

    def __init__(
        self,
        text: bytes,
        path: pathlib.Path,
        folder: str,
        sizes: dict[str, int],
        make: Make,
    ):
        super().__init__(io.BytesIO(text), encoding="utf-8")
        self._path, self._folder, self._sizes, self._make = path, folder, sizes, make

        # Classes of this reader's own, since a pickle may set attributes of them.
        class Namespace(dict):
            def __setstate__(self, state):
                self.update(state)

        self._known = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("argparse", "Namespace"): Namespace,
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
        } | {("torch", name): kind for name, kind in _DTYPES.items()}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            raise _refused(self._path, f"{module}.{name}")
        return self._known[module, name]

    def persistent_load(self, pid: Any) -> Any:
        word, kind, key, _, count = pid
        if kind not in _DTYPES.values():
            raise ValueError(f"numbers of the type {kind!r:.40}")
        dtype = jnp.dtype(kind)
        name = f"{self._folder}{key}"
        if word != "storage" or self._sizes[name] != count * dtype.itemsize:
            raise ValueError(f"{count} numbers of {name} are not there")
        return name, dtype, count

    def _tensor(self, storage, offset, shape, strides, *_) -> Any:
        name, dtype, count = storage
        last = offset + sum(
            (size - 1) * step for size, step in zip(shape, strides, strict=True)
        )
        whole = math.prod(shape)
        inside = min((offset, *shape, *strides)) >= 0 and last < count
        if whole and not (inside and whole <= count):
            raise ValueError(f"an array of shape {shape} is not within its {count}")
        read = functools.partial(self._array, name, dtype, offset, shape, strides)
        return self._make(tuple(shape), dtype.name, read)

    def _array(self, name, dtype, offset, shape, strides) -> np.ndarray:
        with zipfile.ZipFile(self._path) as archive:
            flat = np.frombuffer(archive.read(name), dtype)[offset:]
        steps = [step * dtype.itemsize for step in strides]
        return np.lib.stride_tricks.as_strided(flat, shape, steps).copy()
