# SPDX-License-Identifier: Apache-2.0
"""A folder in COCO's form: images, and a JSON file of their objects for each split."""

import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
from typing import Any, Literal, NamedTuple

import numpy as np

from mim_jax.data.sources.base import Source, check_split

LAYOUT = (
    "want PATH/annotations/instances_train2017.json and the images in PATH/train2017, "
    "and the same for val2017"
)
_NAMED = 3  # annotations of each kind in a note


class _Table(NamedTuple):
    """What a JSON file holds.

    Attributes:
        images: of each, its entry in the file.
        objects: of each image, the entries of its annotations.
        names: of the classes, in the order of their ids.
        labels: position among the classes, by id.
        note: what of the annotations is odd.
    """

    images: list[dict[str, Any]]
    objects: list[list[dict[str, Any]]]
    names: tuple[str, ...]
    labels: dict[int, int]
    note: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coco(Source):
    """Images with boxes, classes and masks from a folder in COCO's form,
    arXiv:1405.0312; `python -m mim_jax.data.coco` writes one.

    Classes are numbered in the order of the category ids. Training reads images with
    at least one object that is no crowd, evaluation all images. Boxes that reach over
    the border of their image, boxes without area and objects without a mask are
    counted in the run's first lines; an example cuts or leaves them out.

    Attributes:
        path: the folder; "" is what the environment variable COCO_DIR names.
        split: "train" or "held_out".
        train_folder, held_out_folder: of the images, and what "{}" in `annotations`
            stands for.
        annotations: the JSON files below `path`.
        empty: whether training reads images without objects, too.
        channels: every image is converted to them.
    """

    path: str = ""
    split: str = "train"
    train_folder: str = "train2017"
    held_out_folder: str = "val2017"
    annotations: str = "annotations/instances_{}.json"
    empty: bool = False
    # This field implements the property.
    channels: Literal[1, 3] = 3  # pyright: ignore

    def __post_init__(self):
        check_split(self.split)
        if not self._home:
            raise FileNotFoundError(
                "path is empty, and so is COCO_DIR: name a folder in COCO's form; "
                f"{LAYOUT}"
            )
        for folder in (self.train_folder, self.held_out_folder):
            for place in (self._json(folder), self._folder(folder)):
                if not place.exists():
                    raise FileNotFoundError(f"{place} does not exist; {LAYOUT}")
        _ = self._table  # raises if the file is broken

    @property
    def _home(self) -> str:
        return self.path or os.environ.get("COCO_DIR", "")

    def _json(self, folder: str) -> pathlib.Path:
        return pathlib.Path(self._home) / self.annotations.format(folder)

    def _folder(self, folder: str) -> pathlib.Path:
        return pathlib.Path(self._home) / folder

    @property
    def _own(self) -> str:
        return self.train_folder if self.split == "train" else self.held_out_folder

    @functools.cached_property
    def _table(self) -> _Table:
        file = self._json(self._own)
        table = _read(file)
        _check_files(file, table, self._folder(self._own))
        if self.split == "train" and not self.empty:
            kept = [
                number
                for number, objects in enumerate(table.objects)
                if any(not one.get("iscrowd") for one in objects)
            ]
            table = table._replace(
                images=[table.images[number] for number in kept],
                objects=[table.objects[number] for number in kept],
            )
        if not table.images:
            raise ValueError(
                f"{file} has no image with objects: want at least one, or empty=True"
            )
        return table

    def __len__(self) -> int:
        return len(self._table.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        table = self._table
        image, objects = table.images[index], table.objects[index]
        path = self._folder(self._own) / image["file_name"]
        corners = np.array([one["bbox"] for one in objects], np.float64).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        return {
            "image": path.read_bytes(),
            "label": -1,
            "boxes": corners.astype(np.float32),
            "classes": np.array(
                [table.labels[one["category_id"]] for one in objects], np.int32
            ),
            "crowd": np.array([bool(one.get("iscrowd")) for one in objects], bool),
            "areas": np.array([_area(one) for one in objects], np.float64),
            "segments": [one.get("segmentation") for one in objects],
            "ids": [one["id"] for one in objects],
        }

    def name_of(self, index: int) -> str:
        image = self._table.images[index]
        return f"{self._folder(self._own) / image['file_name']} (id {image['id']})"

    @property
    def classes(self) -> tuple[str, ...]:
        return ()  # of a whole image

    @property
    def object_classes(self) -> tuple[str, ...]:
        return self._table.names

    @property
    def note(self) -> str:
        return self._table.note

    def labels(self) -> np.ndarray:
        return np.full(len(self), -1, np.int32)

    def held_out(self) -> "Coco":
        return dataclasses.replace(self, split="held_out")

    def fingerprint(self) -> dict[str, Any]:
        table = self._table
        lines = [
            f"{image['file_name']} {len(objects)}"
            for image, objects in zip(table.images, table.objects, strict=True)
        ]
        text = "\n".join([*table.names, *lines]).encode(errors="surrogateescape")
        return {
            "name": "coco",
            "split": self.split,
            "count": len(self),
            "files": hashlib.sha256(text).hexdigest(),
        }


def _area(one: dict[str, Any]) -> float:
    """Of the mask, if the file states it, else of the box."""
    if "area" in one:
        return float(one["area"])
    return float(one["bbox"][2]) * float(one["bbox"][3])


def _read(file: pathlib.Path) -> _Table:
    """What a file of instances holds, checked.

    Raises:
        ValueError: naming the file, the id of the entry and what is wrong with it.
    """
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}; want a sound file") from error
    parts = ("images", "annotations", "categories")
    for part in parts:
        if not isinstance(found, dict) or not isinstance(found.get(part), list):
            raise ValueError(f"{file}: no list {part!r}; want {', '.join(parts)}")
    images = found["images"]
    _check_entries(file, "images", images, ("id", "file_name", "height", "width"))
    categories = found["categories"]
    _check_entries(file, "categories", categories, ("id", "name"))
    annotations = found["annotations"]
    _check_entries(
        file, "annotations", annotations, ("id", "image_id", "category_id", "bbox")
    )
    categories = sorted(categories, key=lambda one: one["id"])
    labels = {one["id"]: number for number, one in enumerate(categories)}
    places = {one["id"]: number for number, one in enumerate(images)}
    objects: list[list[dict[str, Any]]] = [[] for _ in images]
    odd: dict[str, list[Any]] = {
        "boxes reach over the border": [],
        "boxes have no area": [],
        "objects have no mask": [],
    }
    for one in annotations:
        where = f"{file}: annotation {one['id']}"
        if one["image_id"] not in places:
            raise ValueError(
                f"{where} has image_id {one['image_id']!r}, which no image has; want "
                "the id of one of the file's images"
            )
        if one["category_id"] not in labels:
            raise ValueError(
                f"{where} has category_id {one['category_id']!r}, which no category "
                f"has; want one of {_some(labels)}"
            )
        _check_box(where, one["bbox"])
        place = places[one["image_id"]]
        objects[place].append(one)
        for kind in _odd(one, images[place]):
            odd[kind].append(one["id"])
    return _Table(
        images, objects, tuple(one["name"] for one in categories), labels, _note(odd)
    )


def _check_entries(
    file: pathlib.Path, part: str, entries: list[Any], keys: tuple[str, ...]
) -> None:
    seen = set()
    for number, one in enumerate(entries):
        given = one if isinstance(one, dict) else {}
        if lacks := [key for key in keys if key not in given]:
            name = given.get("id", "?")
            raise ValueError(
                f"{file}: entry {number} of {part!r} (id {name}) has no "
                f"{', '.join(lacks)}; want {', '.join(keys)}"
            )
        if one["id"] in seen:
            raise ValueError(
                f"{file}: two entries of {part!r} have the id {one['id']!r}; want one"
            )
        seen.add(one["id"])


def _check_box(where: str, box: Any) -> None:
    sound = (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(n, int | float) and math.isfinite(n) for n in box)
    )
    if not sound:
        raise ValueError(
            f"{where} has bbox {box!r}: want left, top, width and height in pixels"
        )


def _odd(one: dict[str, Any], image: dict[str, Any]) -> list[str]:
    """What is odd about an annotation, in the words of the note."""
    left, top, width, height = one["bbox"]
    found = []
    right, bottom = left + width - image["width"], top + height - image["height"]
    if min(left, top) < -0.5 or max(right, bottom) > 0.5:
        found.append("boxes reach over the border")
    if width <= 0 or height <= 0:
        found.append("boxes have no area")
    if not one.get("segmentation"):
        found.append("objects have no mask")
    return found


def _note(odd: dict[str, list[Any]]) -> str:
    parts = [f"{len(ids)} {kind} (id {_some(ids)})" for kind, ids in odd.items() if ids]
    return "of the annotations " + ", ".join(parts) if parts else ""


def _some(ids: Any) -> str:
    ids = list(ids)
    more = ", ..." if len(ids) > _NAMED else ""
    return ", ".join(map(str, ids[:_NAMED])) + more


def _check_files(file: pathlib.Path, table: _Table, folder: pathlib.Path) -> None:
    """FileNotFoundError unless all images are there."""
    with os.scandir(folder) as entries:
        there = {entry.name for entry in entries}
    lost = [
        one
        for one in table.images
        if one["file_name"] not in there and not (folder / one["file_name"]).is_file()
    ]
    if lost:
        raise FileNotFoundError(
            f"{folder / lost[0]['file_name']}, image {lost[0]['id']} of {file}, is not "
            f"there, and neither are {len(lost) - 1} others; want all images of the "
            "file"
        )
