# SPDX-License-Identifier: Apache-2.0
"""Evaluation sets with the classes of ImageNet: V2, R, A, Sketch and ReaL.

imagenet.json holds facts that the authors of the sets published: the 1,000 WordNet ids
in the order of labels, and which 200 of them ImageNet-A and ImageNet-R have.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import numpy as np

from mim_jax.data.sets.base import (
    EvaluationSet,
    Files,
    check_class_folders,
    data_dir_of,
    find_folder,
)
from mim_jax.data.sources.base import Source
from mim_jax.data.sources.folder import list_classes, list_images
from mim_jax.data.sources.tfds import Tfds

CLASSES = 1000
MOST_REAL_LABELS = 9  # of one image in real.json; 3,163 images have none
_REAL = "real.json"
_VALIDATION = "ILSVRC2012_val_{:08d}.JPEG"


@functools.cache
def facts() -> dict[str, tuple]:
    """ "wnids": names in the order of labels; "imagenet_a", "imagenet_r": labels."""
    path = pathlib.Path(__file__).with_name("imagenet.json")
    return {key: tuple(value) for key, value in json.loads(path.read_text()).items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared(EvaluationSet):
    """A data set prepared by TFDS, with labels of ImageNet.

    Attributes:
        source: its records.
        label_key: the feature with one label or a sequence of labels.
        members: one label of ImageNet for each class; an image whose label is not among
            them has none.
    """

    source: Tfds
    label_key: str = "label"
    classes: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]
    labels: int = 1
    model_classes: int = CLASSES

    @functools.cached_property
    def _positions(self) -> dict[int, int]:
        return {label: position for position, (label,) in enumerate(self.members)}

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.source.record(index)
        given = np.atleast_1d(record[self.label_key]).tolist()
        known = (self._positions[label] for label in given if label in self._positions)
        return {"image": record[self.source.image_key], "labels": tuple(known)}


def build(
    entry: str,
    folder: str,
    source: Source,
    *,
    dataset: str,
    some: bool = False,
    numbered: bool = False,
) -> EvaluationSet:
    """V2, R, A or Sketch, prepared by TFDS or from its own folder.

    Args:
        entry: name in the table.
        folder: has a sub-folder per class; "": ask TFDS.
        source: of the run; it says where prepared data sets lie.
        dataset: name in TFDS; its split "test" has labels 0 to 999.
        some: the set has only the classes that imagenet.json lists under `entry`.
        numbered: sub-folders have labels as names, "0" to "999", not WordNet ids.
    Raises:
        ValueError: the set is absent or has other classes.
    """
    wnids = facts()["wnids"]
    chosen = facts()[entry] if some else tuple(range(CLASSES))
    members = tuple((label,) for label in chosen)
    classes = tuple(wnids[label] for label in chosen)
    if not folder:
        prepared = _tfds(entry, dataset, "test", source)
        return Prepared(source=prepared, classes=classes, members=members)
    layout = "a sub-folder per class, " + (
        "'0' to '999'" if numbered else "as n01440764"
    )
    path = find_folder(entry, folder, layout)
    # In the order of labels; in the order of text, '10' would come before '2'.
    names = tuple(str(label) if numbered else wnids[label] for label in chosen)
    check_class_folders(entry, path, list_classes(path), names)
    records = tuple(
        (f"{name}/{image}", (position,))
        for position, name in enumerate(names)
        for image in list_images(path / name)
    )
    return Files(folder=path, records=records, classes=classes, members=members)


def real(entry: str, folder: str, source: Source) -> EvaluationSet:
    """ImageNet's validation images with the labels of arXiv:2006.07159.

    An image may have several right labels; evaluations leave out those with none.

    Args:
        folder: has real.json and ILSVRC2012_val_*.JPEG, the images directly or in
            sub-folders; "": ask TFDS.
    Raises:
        ValueError: the set is absent, or the number of images is not that of labels.
    """
    members = tuple((label,) for label in range(CLASSES))
    if not folder:
        return Prepared(
            source=_tfds(entry, "imagenet2012_real", "validation", source),
            label_key="real_label",
            classes=facts()["wnids"],
            members=members,
            labels=MOST_REAL_LABELS,
        )
    path = find_folder(entry, folder, f"{_REAL} and ILSVRC2012_val_*.JPEG")
    if not (path / _REAL).is_file():
        raise ValueError(
            f"set {entry!r}: no {_REAL} in {path}; want the one of "
            "github.com/google-research/reassessed-imagenet there"
        )
    labels = json.loads((path / _REAL).read_text())
    found = {image: image for image in list_images(path)}
    for name in list_classes(path):
        found |= {image: f"{name}/{image}" for image in list_images(path / name)}
    # The list has no names: entry i belongs to image number i + 1.
    names = [_VALIDATION.format(number) for number in range(1, len(labels) + 1)]
    missing = [name for name in names if name not in found]
    if missing or len(found) != len(labels):
        raise ValueError(
            f"set {entry!r}: {path} has {len(found)} images and {_REAL} has labels for "
            f"{len(labels)}" + (f"; missing: {missing[0]}, ..." if missing else "")
        )
    records = zip((found[name] for name in names), map(tuple, labels), strict=True)
    return Files(
        folder=path,
        records=tuple(records),
        classes=facts()["wnids"],
        members=members,
        labels=MOST_REAL_LABELS,
    )


def _tfds(entry: str, dataset: str, split: str, source: Source) -> Tfds:
    """A prepared data set.

    Raises:
        ValueError: it is not prepared, or its classes are not those of ImageNet.
    """
    where = data_dir_of(source)
    try:
        found = Tfds(dataset=dataset, split=split, data_dir=where)
    except FileNotFoundError as error:
        raise ValueError(
            f"set {entry!r}: {str(error).splitlines()[0]}; prepare it once, python -m "
            f"mim_jax.data.prepare {dataset} --data_dir=..., or name a folder, "
            f"'{entry}=FOLDER': docs/data.md has its layout"
        ) from error
    if found.classes and found.classes != facts()["wnids"]:
        raise ValueError(
            f"set {entry!r}: {dataset} has {len(found.classes)} classes that are not "
            "ImageNet's in their order; want the data set of TFDS by that name"
        )
    return found
