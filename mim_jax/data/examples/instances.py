# SPDX-License-Identifier: Apache-2.0
"""Images with their objects: boxes, classes and masks of fixed shapes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mim_jax.data.decoding import Undecodable, decode
from mim_jax.data.examples.base import Examples, common_fields
from mim_jax.data.fields import Example, Fields, FieldSpec
from mim_jax.data.geometry import Geometry
from mim_jax.data.segments import Objects, box_of, mask_of, objects_of
from mim_jax.data.transforms import View
from mim_jax.schema import check_ranges, within

_PADDING = 128  # grey, beside pictures that do not fill the image
_LEAST = 1.0  # pixel: a smaller side of a box is none


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instances(Examples):
    """The whole picture, resized in proportion, with its objects.

    Training resizes by large-scale jitter, arXiv:2012.07177: the picture that just fits
    `data.image_size` times a factor, of which a random window is shown. Below it, and
    to its right, an image is grey. `data.flip` mirrors one picture of two. Crowds are
    left out, as are objects of which less than a pixel is shown. Of more than `most`
    objects, the largest are kept.

    Training examples have, besides `image` and `label`:

    - `size`, int32 (2,): rows and columns of the picture in the image.
    - `boxes`, float32 (most, 4): left, top, right, bottom in pixels of the image.
    - `boxes_valid`, bool (most,): which entries are objects.
    - `categories`, int32 (most,): positions in the source's `object_classes`, or -1.
    - `masks`, bool (most, mask_side, mask_side): each covers its own box.
    - `masks_valid`, bool (most,): which objects have a mask.

    Examples for evaluation have `size`, and `shape`, int32 (2,): rows and columns of
    the picture before it was resized; the evaluation reads the objects themselves from
    the record. Crops, crop sizes and RandAugment of `data` do nothing here.

    Attributes:
        most: objects of an example.
        mask_side: rows and columns of a mask.
        jitter: least and greatest factor.
    """

    most: int = within(100, least=1, most=2**12)
    mask_side: int = within(56, least=1, most=1024)
    jitter: tuple[float, float] = within((0.1, 2.0), above=0, most=100)

    def __post_init__(self):
        check_ranges(self)
        if self.jitter[0] > self.jitter[1]:
            raise ValueError(f"jitter={self.jitter}: want least <= greatest")

    def fields(self, data: Geometry) -> Fields:
        return _whole(data) | {
            "boxes": FieldSpec((self.most, 4), np.float32),
            "boxes_valid": FieldSpec((self.most,), np.bool_),
            "categories": FieldSpec((self.most,), np.int32, fill=-1),
            "masks": FieldSpec((self.most, self.mask_side, self.mask_side), np.bool_),
            "masks_valid": FieldSpec((self.most,), np.bool_),
        }

    def eval_fields(self, data: Geometry) -> Fields:
        return _whole(data) | {"shape": FieldSpec((2,), np.int32)}

    def train(
        self, record: Mapping[str, Any], data: Geometry, rng: np.random.Generator
    ) -> Example:
        pixels = decode(record["image"], data.source.channels)
        shape = pixels.shape[:2]
        objects = objects_of(record, shape)
        factor = float(rng.uniform(*self.jitter))
        resized = _fitted(shape, data.image_size, factor)
        rows, cols = data.image_size
        size = min(resized[0], rows), min(resized[1], cols)
        top = int(rng.integers(resized[0] - size[0] + 1))
        left = int(rng.integers(resized[1] - size[1] + 1))
        mirrored = bool(data.flip and rng.random() < 0.5)
        view = View(shape, (0, 0, *shape), resized, (top, left), size, mirrored)
        shown = _shown(record, pixels, view, data)
        return shown | self._objects(objects, view)

    def evaluate(self, record: Mapping[str, Any], data: Geometry) -> Example:
        pixels = decode(record["image"], data.source.channels)
        shape = pixels.shape[:2]
        resized = _fitted(shape, data.image_size, 1.0)
        view = View(shape, (0, 0, *shape), resized, (0, 0), resized, False)
        shown = _shown(record, pixels, view, data)
        return shown | {"shape": np.array(shape, np.int32)}

    def _objects(self, objects: Objects, view: View) -> Example:
        found = {
            "boxes": np.zeros((self.most, 4), np.float32),
            "boxes_valid": np.zeros(self.most, bool),
            "categories": np.full(self.most, -1, np.int32),
            "masks": np.zeros((self.most, self.mask_side, self.mask_side), bool),
            "masks_valid": np.zeros(self.most, bool),
        }
        boxes = _boxes(objects.boxes, view)
        sides = (boxes[:, 2:] - boxes[:, :2]).clip(0)
        shown = (sides >= _LEAST).all(axis=1) & ~objects.crowd
        order = np.argsort(-sides.prod(axis=1), kind="stable")
        place = 0
        for number in order[shown[order]].tolist():
            if place == self.most:
                break
            box, segment = boxes[number], objects.segments[number]
            try:
                mask = mask_of(segment, view.shape)
            except (ValueError, KeyError, TypeError) as error:
                raise Undecodable(
                    f"mask of annotation {objects.ids[number]}: {error}"
                ) from error
            if mask is not None:
                box = _visible(mask, box, view)
                if (box[2:] - box[:2] < _LEAST).any():
                    continue
                found["masks"][place] = self._framed(mask, box, view)
            found["masks_valid"][place] = mask is not None
            found["boxes"][place], found["boxes_valid"][place] = box, True
            found["categories"][place] = objects.classes[number]
            place += 1
        return found

    def _framed(self, mask: np.ndarray, box: np.ndarray, view: View) -> np.ndarray:
        """The part of a picture's mask in a box of the image, at `mask_side`."""
        share = (np.arange(self.mask_side) + 0.5) / self.mask_side
        x = box[0] + share * (box[2] - box[0])
        y = box[1] + share * (box[3] - box[1])
        if view.mirrored:
            x = view.size[1] - x
        rows, cols = (
            np.clip(((place + corner) / zoom).astype(int), 0, count - 1)
            for place, corner, zoom, count in zip(
                (y, x), view.corner, _zoom(view), mask.shape, strict=True
            )
        )
        return mask[rows[:, None], cols]


def _whole(data: Geometry) -> Fields:
    return common_fields(data) | {"size": FieldSpec((2,), np.int32)}


def _fitted(
    shape: tuple[int, int], size: tuple[int, int], factor: float
) -> tuple[int, int]:
    """Rows and columns of a picture that just fits `factor` times a size."""
    zoom = factor * min(size[0] / shape[0], size[1] / shape[1])
    return max(1, round(zoom * shape[0])), max(1, round(zoom * shape[1]))


def _shown(
    record: Mapping[str, Any], pixels: np.ndarray, view: View, data: Geometry
) -> Example:
    image = np.full(data.image_shape, _PADDING, np.uint8)
    rows, cols = (min(a, b) for a, b in zip(view.size, data.image_size, strict=True))
    image[:rows, :cols] = view.image(pixels)[:rows, :cols]
    return {
        "image": image,
        "label": np.int32(record["label"]),
        "size": np.array((rows, cols), np.int32),
    }


def _zoom(view: View) -> tuple[float, float]:
    return view.resized[0] / view.shape[0], view.resized[1] / view.shape[1]


def _boxes(boxes: np.ndarray, view: View) -> np.ndarray:
    """Boxes of the picture as boxes of what is shown, cut to it."""
    down, across = _zoom(view)
    found = boxes.astype(np.float64) * (across, down, across, down)
    found -= (view.corner[1], view.corner[0]) * 2
    rows, cols = view.size
    found = np.clip(found, 0, (cols, rows, cols, rows))
    if view.mirrored:
        found[:, [0, 2]] = cols - found[:, [2, 0]]
    return found.astype(np.float32)


def _visible(mask: np.ndarray, box: np.ndarray, view: View) -> np.ndarray:
    """The box of the part of a mask that a box shows, if the window cuts the object;
    else the box, which a file states more finely than pixels can."""
    whole = np.array([box_of(mask)], np.float32)
    moved = _boxes(whole, view)[0]
    edges = np.array([0, 0, view.size[1], view.size[0]], np.float32)
    if not (moved == edges).any():
        return box
    down, across = _zoom(view)
    top, left = view.corner[0] / down, view.corner[1] / across
    bottom, right = top + view.size[0] / down, left + view.size[1] / across
    first, last = max(0, int(top)), int(np.ceil(bottom))
    start, stop = max(0, int(left)), int(np.ceil(right))
    inside = box_of(mask[first:last, start:stop])
    moved = np.array([inside], np.float32) + np.array([start, first] * 2, np.float32)
    if not any(inside):
        return np.zeros(4, np.float32)
    return _boxes(moved, view)[0]
