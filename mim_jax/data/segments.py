# SPDX-License-Identifier: Apache-2.0
"""Objects of an image: boxes, classes and masks, in the forms that COCO has.

A record with objects has, besides `image`, what `RECORD` names:

- `boxes`, float32 (n, 4): left, top, right, bottom in pixels of the image.
- `classes`, int32 (n,): positions in the source's `object_classes`.
- `crowd`, bool (n,): True of a region with many objects that are not told apart.
- `areas`, float64 (n,): of the masks, in square pixels.
- `segments`, a list of n: polygons [[x, y, x, y, ...], ...]; or a mask in runs,
  {"size": [rows, columns], "counts": [...]}, whose counts, column by column, are
  of 0 and 1 in turn, or a string of pycocotools; or None without a mask.
- `ids`, a list of n: of the annotations, for messages.

Records of TFDS's COCO have `objects` instead, boxes without masks.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

RECORD = ("boxes", "classes", "crowd", "areas", "segments", "ids")
INSTALL = "pip install -e '.[detection]'"


class Objects(NamedTuple):
    """The objects of one image, in the form that the module's docstring states."""

    boxes: Float[np.ndarray, "n 4"]
    classes: Int[np.ndarray, " n"]
    crowd: Bool[np.ndarray, " n"]
    areas: Float[np.ndarray, " n"]
    segments: list[Any]
    ids: list[Any]


def objects_of(record: Mapping[str, Any], shape: tuple[int, int]) -> Objects:
    """The objects of a record.

    Args:
        shape: rows and columns of its image.
    Raises:
        ValueError: the record says nothing of objects.
    """
    if all(name in record for name in RECORD):
        return Objects(*(record[name] for name in RECORD))
    if "objects" in record and "bbox" in record["objects"]:
        return _of_tfds(record["objects"], shape)
    raise ValueError(
        f"a record has {', '.join(sorted(map(str, record)))} and no objects: want a "
        f"source whose records have {', '.join(RECORD)}, such as scenes or coco"
    )


def _of_tfds(given: Mapping[str, Any], shape: tuple[int, int]) -> Objects:
    """TFDS gives top, left, bottom, right as shares of the image."""
    rows, cols = shape
    shares = np.asarray(given["bbox"], np.float32).reshape(-1, 4)
    boxes = shares[:, [1, 0, 3, 2]] * np.array([cols, rows, cols, rows], np.float32)
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 0)
    count = len(boxes)
    return Objects(
        boxes=boxes,
        classes=np.asarray(given["label"], np.int32).reshape(count),
        crowd=np.asarray(given.get("is_crowd", np.zeros(count)), bool).reshape(count),
        areas=np.asarray(given.get("area", sides.prod(axis=1)), np.float64),
        segments=[None] * count,
        ids=list(np.asarray(given.get("id", np.arange(count))).tolist()),
    )


def mask_of(segment: Any, shape: tuple[int, int]) -> Bool[np.ndarray, "h w"] | None:
    """The mask of an object in an image of so many rows and columns; None if it has
    none.

    Polygons are filled as pycocotools does it. Those with fewer than three corners are
    left out.

    Raises:
        ModuleNotFoundError: the segment needs pycocotools.
        ValueError: the runs are of another size, or not as many as pixels.
    """
    if not segment:
        return None
    if isinstance(segment, Mapping) and not isinstance(segment["counts"], str | bytes):
        return _of_runs(segment, shape)
    tools = pycocotools_mask()
    if isinstance(segment, Mapping):
        _check_size(segment, shape)
        return tools.decode(dict(segment)).astype(bool)
    polygons = [one for one in segment if len(one) >= 6]
    if not polygons:
        return None
    return tools.decode(tools.merge(tools.frPyObjects(polygons, *shape))).astype(bool)


def _of_runs(segment: Mapping[str, Any], shape: tuple[int, int]) -> np.ndarray:
    _check_size(segment, shape)
    counts = np.asarray(segment["counts"], np.int64)
    if counts.sum() != shape[0] * shape[1]:
        raise ValueError(
            f"counts sum to {counts.sum()} for {shape[0]} x {shape[1]} pixels: want "
            f"{shape[0] * shape[1]}"
        )
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(shape[1], shape[0]).T


def _check_size(segment: Mapping[str, Any], shape: tuple[int, int]) -> None:
    if list(segment["size"]) != list(shape):
        raise ValueError(
            f"size={list(segment['size'])} of a mask in an image of {list(shape)} rows "
            "and columns: want the same"
        )


def runs_of(mask: Bool[np.ndarray, "h w"]) -> dict[str, Any]:
    """A mask in runs, the inverse of `mask_of`.

    Example:
        >>> runs_of(np.array([[False, True], [False, True]]))
        {'size': [2, 2], 'counts': [2, 2]}
    """
    flat = mask.T.reshape(-1)
    changes = np.flatnonzero(np.diff(flat)) + 1
    ends = np.concatenate([[0], changes, [flat.size]])
    counts = np.diff(ends).tolist()
    if flat.size and flat[0]:
        counts = [0, *counts]
    return {"size": list(mask.shape), "counts": counts}


def box_of(mask: Bool[np.ndarray, "h w"]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the pixels of a mask; zeros if it has none.

    Example:
        >>> box_of(np.array([[False, False, False], [False, True, True]]))
        (1, 1, 3, 2)
    """
    rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return 0, 0, 0, 0
    return int(cols[0]), int(rows[0]), int(cols[-1]) + 1, int(rows[-1]) + 1


def pycocotools_mask() -> Any:
    """pycocotools.mask.

    Raises:
        ModuleNotFoundError: it is not installed; the message says how to.
    """
    try:
        from pycocotools import mask
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"polygons and packed masks need pycocotools: {INSTALL}"
        ) from error
    return mask
