# SPDX-License-Identifier: Apache-2.0
"""The form of the arrays that an example consists of."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mim_jax.schema import returned

_INT = int | np.integer


@dataclasses.dataclass(frozen=True)
class FieldSpec:
    """Shape, type and fill value of one array of an example.

    The shape is fixed, because a compiled step has fixed shapes. A list of varying
    length, such as boxes, is padded to a fixed length beside a bool array that says
    which entries are real.

    Attributes:
        shape: of one example, () for a single number; every size is at least 1.
        dtype: a NumPy scalar type such as `np.float32`: bool, integer or float.
        fill: the value of every element in rows that show no record.
    Raises:
        ValueError: no tuple of sizes of at least 1, another kind of type, or a fill
            value that the type cannot hold.

    Example:
        >>> str(FieldSpec((16, 4), np.float32))
        'float32[16, 4]'
        >>> FieldSpec((2,), np.int32, fill=-1).filled()
        array([-1, -1], dtype=int32)
    """

    shape: tuple[int, ...]
    dtype: type[np.generic]
    fill: int | float | bool = 0

    def __post_init__(self):
        if not isinstance(self.shape, tuple):
            raise ValueError(f"shape={self.shape!r}: want a tuple, such as (4,)")
        if any(not isinstance(size, _INT) or size < 1 for size in self.shape):
            raise ValueError(f"shape={self.shape}: want sizes of at least 1, as ints")
        if not (isinstance(self.dtype, type) and issubclass(self.dtype, np.generic)):
            raise ValueError(
                f"dtype={self.dtype!r}: want a NumPy scalar type, such as np.float32"
            )
        kind = np.dtype(self.dtype).kind
        if kind not in "biuf":
            raise ValueError(
                f"dtype={np.dtype(self.dtype)}: want bool, an integer or a float"
            )
        if kind != "f" and np.array(self.fill).astype(self.dtype) != self.fill:
            raise ValueError(
                f"fill={self.fill}: want a value of type {np.dtype(self.dtype)}"
            )

    def __str__(self) -> str:
        return _form(np.dtype(self.dtype), self.shape)

    def filled(self) -> np.ndarray:
        """The array of a row that shows no record."""
        return np.full(self.shape, self.fill, self.dtype)


Fields = dict[str, FieldSpec]
Example = dict[str, Any]  # an array or NumPy scalar by the name of its field
LABEL = FieldSpec((), np.int32, fill=-1)  # -1: unknown
_ARRAY = np.ndarray | np.generic


class ExampleError(ValueError):
    """A source or its examples do not keep a promise; the message names class and
    method, what came and what is wanted."""


class DataError(RuntimeError):
    """So many records cannot be read that a run gives up; the message names some.

    Attributes:
        everywhere: whether all hosts of the run raise it after the same step.
    """

    everywhere: bool = False


def check_declared(fields: Any, author: str) -> None:
    """Refuses what is no declaration of fields.

    Args:
        author: the method that returned it, for the message.
    Raises:
        ValueError: it is no dict from names to FieldSpecs.
    """
    want = "want a dict of FieldSpecs by name, such as FieldSpec((4,), np.float32)"
    if not isinstance(fields, Mapping):
        raise ValueError(f"{author} returned {returned(fields)}: {want}")
    for name, field in fields.items():
        if not isinstance(name, str) or not isinstance(field, FieldSpec):
            raise ValueError(f"{author} declares {name!r} as {field!r}: {want}")


def check_example(example: Any, fields: Fields, author: str) -> None:
    """Refuses an example that is not as declared.

    Args:
        author: who made the example, for the message.
    Raises:
        ExampleError: a field is missing, was not declared, or has another shape or
            type; or it is no dict.
    """
    if not isinstance(example, Mapping):
        raise ExampleError(
            f"{author} returned {returned(example)}: want a dict with the fields "
            f"{sorted(fields)}"
        )
    if example.keys() != fields.keys():
        missing, extra = fields.keys() - example.keys(), example.keys() - fields.keys()
        raise ExampleError(
            f"{author} returned the fields {sorted(example)}; want those that it "
            f"declares, {sorted(fields)}"
            + (f"; missing: {sorted(missing)}" if missing else "")
            + (f"; not declared: {sorted(extra)}" if extra else "")
        )
    for name, field in fields.items():
        value = example[name]
        # An array or a NumPy scalar: a Python number has no type to compare.
        hint = ""
        if not isinstance(value, _ARRAY):
            got, kind = type(value).__name__, field.dtype.__name__
            hint = f"np.asarray(..., np.{kind})" if field.shape else f"np.{kind}(...)"
            hint = f", such as {hint}"
        elif value.shape != field.shape or value.dtype.type is not field.dtype:
            got = _form(value.dtype, value.shape)
        else:
            continue
        raise ExampleError(f"{author} returned {name!r} as {got}; want {field}{hint}")


def _form(dtype: np.dtype, shape: tuple[int, ...]) -> str:
    return f"{dtype}{list(shape) if shape else ''}"
