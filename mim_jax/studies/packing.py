# SPDX-License-Identifier: Apache-2.0
"""Small arrays in JSON: what a figure shows of a run that is no longer there."""

import base64
import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

_KINDS = "biufU"  # of dtypes: no Python objects
_DIGITS = 5  # of a floating-point number; no figure shows more
_MOST = 2**26  # bytes of an array; what a file claims takes no more memory


def pack(array: np.ndarray) -> dict[str, Any]:
    """An array as JSON values: small arrays as lists, larger ones compressed.

    Floats keep five significant digits as a list, and are float32 when compressed.

    Raises:
        TypeError: it holds neither numbers nor booleans nor text.
        ValueError: it is larger than 64 MiB, which `unpack` would refuse.

    Example:
        >>> pack(np.array([0.5, 0.25]))["list"]
        [0.5, 0.25]
    """
    array = np.asarray(array)
    if array.dtype.kind not in _KINDS:
        raise TypeError(f"dtype={array.dtype}: want numbers, booleans or text")
    _size(array.shape, array.dtype)
    about = {"shape": list(array.shape)}
    if array.dtype.kind == "U" or array.size <= 100:
        values = array.ravel().tolist()
        if array.dtype.kind == "f":
            values = [float(f"{value:.{_DIGITS}g}") for value in values]
        return about | {"dtype": array.dtype.str, "list": values}
    if array.dtype.kind == "f":
        array = array.astype("<f4")
    array = array.astype(array.dtype.newbyteorder("<"))
    data = base64.b64encode(zlib.compress(array.tobytes(), 9)).decode()
    return about | {"dtype": array.dtype.str, "zlib": data}


def unpack(packed: dict[str, Any]) -> np.ndarray:
    """The array of `pack`.

    Raises:
        TypeError, ValueError, KeyError: somebody changed it.

    Example:
        >>> unpack(pack(np.arange(200))).sum()
        19900
    """
    shape, kind = packed["shape"], np.dtype(packed["dtype"])
    if kind.kind not in _KINDS:
        raise TypeError(f"dtype={kind}: want numbers, booleans or text")
    size = _size(shape, kind)
    if "list" in packed:
        values = packed["list"]
        if len(values) != math.prod(shape) or any(
            isinstance(value, list | dict) for value in values
        ):
            raise ValueError(f"shape={shape}: want a list of so many values")
        return np.array(values, kind).reshape(shape)
    unpacker = zlib.decompressobj()
    try:
        # Not more than it claims. A limit of 0 would be none.
        raw = unpacker.decompress(base64.b64decode(packed["zlib"]), size + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    return np.frombuffer(raw, kind).reshape(shape)


def _size(shape: Sequence[int], kind: np.dtype) -> int:
    """The bytes of such an array; ValueError if there is none, or it is too large."""
    if any(type(side) is not int or side < 0 for side in shape):
        raise ValueError(f"shape={shape}: want sizes of at least 0")
    size = math.prod(shape) * kind.itemsize
    if size > _MOST:
        raise ValueError(
            f"shape={shape}, dtype={kind}: {size} bytes, want at most {_MOST}"
        )
    return size
