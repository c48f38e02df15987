# SPDX-License-Identifier: Apache-2.0
"""The form of the arrays that an example consists of."""

import dataclasses
from typing import Any

import numpy as np


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
        ValueError: a size below 1, another kind of type, or a fill value that the type
            cannot hold.

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
        if any(size < 1 for size in self.shape):
            raise ValueError(f"shape={self.shape}: want sizes of at least 1")
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


def check_example(example: Example, fields: Fields, author: str) -> None:
    """Refuses an example that is not as declared.

    Args:
        author: who made the example, for the message.
    Raises:
        ValueError: a field is missing, was not declared, or has another shape or type.
    """
    if example.keys() != fields.keys():
        missing, extra = fields.keys() - example.keys(), example.keys() - fields.keys()
        raise ValueError(
            f"{author} returned the fields {sorted(example)}; want those that it "
            f"declares, {sorted(fields)}"
            + (f"; missing: {sorted(missing)}" if missing else "")
            + (f"; not declared: {sorted(extra)}" if extra else "")
        )
    for name, field in fields.items():
        value = example[name]
        # An array or a NumPy scalar: a Python number has no type to compare.
        if not isinstance(value, _ARRAY):
            got = type(value).__name__
        elif value.shape != field.shape or value.dtype.type is not field.dtype:
            got = _form(value.dtype, value.shape)
        else:
            continue
        raise ValueError(f"{author} returned {name!r} as {got}; want {field}")


def _form(dtype: np.dtype, shape: tuple[int, ...]) -> str:
    return f"{dtype}{list(shape) if shape else ''}"
