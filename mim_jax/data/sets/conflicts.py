# SPDX-License-Identifier: Apache-2.0
"""Cue conflicts: images with the shape of one class and the texture of another."""

import dataclasses
import re
from typing import Any

from mim_jax.data.sets.base import (
    EvaluationSet,
    Files,
    check_class_folders,
    check_no_folder,
    find_folder,
)
from mim_jax.data.sets.imagenet import CLASSES
from mim_jax.data.sources.base import Source
from mim_jax.data.sources.cues import SHAPES, render
from mim_jax.data.sources.folder import list_classes, list_images

# Ranges of ImageNet's labels (first, last) that belong to a category, as published with
# arXiv:1811.12231. A few kinds of birds and dogs belong to none.
CATEGORIES: dict[str, tuple[tuple[int, int], ...]] = {
    "airplane": ((404, 404),),
    "bear": ((294, 297),),
    "bicycle": ((444, 444), (671, 671)),
    "bird": (
        *((8, 8), (10, 16), (18, 20), (22, 24), (80, 83), (87, 96), (98, 100)),
        *((127, 133), (135, 145)),
    ),
    "boat": ((472, 472), (554, 554), (625, 625), (814, 814), (914, 914)),
    "bottle": ((440, 440), (720, 720), (737, 737), (898, 899), (901, 901), (907, 907)),
    "car": ((436, 436), (511, 511), (817, 817)),
    "cat": ((281, 286),),
    "chair": ((423, 423), (559, 559), (765, 765), (857, 857)),
    "clock": ((409, 409), (530, 530), (892, 892)),
    "dog": (
        *((152, 191), (193, 203), (205, 226), (228, 241), (243, 250), (252, 257)),
        *((259, 259), (261, 263), (265, 268)),
    ),
    "elephant": ((385, 386),),
    "keyboard": ((508, 508), (878, 878)),
    "knife": ((499, 499),),
    "oven": ((766, 766),),
    "truck": (
        *((555, 555), (569, 569), (656, 656), (675, 675), (717, 717), (734, 734)),
        *((864, 864), (867, 867)),
    ),
}
_NAME = re.compile(r"([a-z]+)\d+-([a-z]+)\d+\.\w+")
_DRAWINGS = 8  # for each pair of different classes


def members() -> tuple[tuple[int, ...], ...]:
    """Labels of ImageNet in each of the 16 categories."""
    return tuple(
        tuple(label for first, last in ranges for label in range(first, last + 1))
        for ranges in CATEGORIES.values()
    )


def cue_conflict(entry: str, folder: str, source: Source) -> Files:
    """The published stimuli of arXiv:1811.12231: 16 folders of 80 images.

    Args:
        folder: has a sub-folder per category of shapes, with files such as
            cat7-elephant1.png, a cat's shape with an elephant's skin; "":
            CUE_CONFLICT_DIR names it.
    Raises:
        ValueError: the sub-folders are others, or a file's name is no such pair.
    """
    del source
    layout = "SHAPE/SHAPE1-TEXTURE1.png, 16 folders"
    path = find_folder(entry, folder, layout, "CUE_CONFLICT_DIR")
    names = tuple(CATEGORIES)
    check_class_folders(entry, path, list_classes(path), names)
    records = []
    for shape in names:
        for image in list_images(path / shape):
            found = _NAME.fullmatch(image)
            if not found or found[1] != shape or found[2] not in names:
                raise ValueError(
                    f"set {entry!r}: {path / shape / image}: want a name such as "
                    f"{shape}7-elephant1.png, of two of {', '.join(names)}"
                )
            labels = (names.index(shape), names.index(found[2]))
            records.append((f"{shape}/{image}", labels))
    return Files(
        folder=path,
        records=tuple(records),
        classes=names,
        members=members(),
        model_classes=CLASSES,
        labels=2,
        pairs=True,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawnConflicts(EvaluationSet):
    """Drawings like those of source `cues`, for every pair of different classes.

    Attributes:
        drawings: per pair.
    """

    drawings: int = _DRAWINGS
    classes: tuple[str, ...] = SHAPES
    members: tuple[tuple[int, ...], ...] = tuple((k,) for k in range(len(SHAPES)))
    model_classes: int = len(SHAPES)
    labels: int = 2
    pairs: bool = True

    def __len__(self) -> int:
        return self.drawings * self.model_classes * (self.model_classes - 1)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = index // self.drawings
        shape, other = divmod(pair, self.model_classes - 1)
        texture = other + (other >= shape)
        # Neither split of the source draws from a stream that begins with 2.
        image = render(shape, texture, (2, index))
        return {"image": image, "labels": (shape, texture)}


def drawn(entry: str, folder: str, source: Source) -> DrawnConflicts:
    """The set that the program draws itself.

    Raises:
        ValueError: a folder is named.
    """
    del source
    check_no_folder(entry, folder)
    return DrawnConflicts()
