# SPDX-License-Identifier: Apache-2.0
"""Small arrays in JSON: what a figure shows of a run that is no longer there."""

import base64
import math
import zlib
from typing import Any

import numpy as np

_KINDS = "biufU"  # of dtypes: no Python objects
_DIGITS = 5  # of a floating-point number; no figure shows more


def pack(array: np.ndarray) -> dict[str, Any]:
    """An array as JSON values: small arrays as lists, larger ones compressed.

    Floats keep five significant digits as a list, and are float32 when compressed.

    Raises:
        TypeError: it holds neither numbers nor booleans nor text.

    Example:
        >>> pack(np.array([0.5, 0.25]))["list"]
        [0.5, 0.25]
    """
    array = np.asarray(array)
    if array.dtype.kind not in _KINDS:
        raise TypeError(f"dtype={array.dtype}: want numbers, booleans or text")
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
    if "list" in packed:
        return np.array(packed["list"], kind).reshape(shape)
    size = math.prod(shape) * kind.itemsize  # a file may claim to hold little
    unpacker = zlib.decompressobj()
    try:
        raw = unpacker.decompress(base64.b64decode(packed["zlib"]), size + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    return np.frombuffer(raw, kind).reshape(shape)
