# SPDX-License-Identifier: Apache-2.0
"""ObjectNet, from its download, by the class map that comes with it."""

import json
import pathlib

from mim_jax.data.sets.base import Files, an_own_folder, same_folders
from mim_jax.data.sets.imagenet import CLASSES
from mim_jax.data.sources.base import Source
from mim_jax.data.sources.folder import list_classes, list_images

FOLDERS, SHARED = 313, 113
# Every image has a red frame, so that it is recognised when used for training.
BORDER = 2
_LAYOUT = "images/FOLDER/*.png and mappings/*, as objectnet-1.0.zip has them"


def objectnet(entry: str, folder: str, source: Source) -> Files:
    """The images of the 113 classes that ImageNet has, too.

    A class of ObjectNet may be several of ImageNet: bicycles of both kinds. Images of
    the other 200 classes are not read.

    Args:
        folder: objectnet-1.0, with images and mappings.
    Raises:
        ValueError: there is no such folder, or not with 313 classes and 113 shared.
    """
    del source
    path = an_own_folder(entry, folder, _LAYOUT)
    for part in ("images", "mappings"):
        an_own_folder(entry, str(path / part), _LAYOUT)
    try:
        shared, folders = read_map(path / "mappings")
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"set {entry!r}: {path / 'mappings'}: {error}") from error
    if (len(folders), len(shared)) != (FOLDERS, SHARED):
        raise ValueError(
            f"set {entry!r}: {path / 'mappings'} has {len(folders)} classes, "
            f"{len(shared)} of them in ImageNet; want {FOLDERS} and {SHARED}"
        )
    same_folders(entry, path / "images", list_classes(path / "images"), folders)
    names = tuple(sorted(shared))
    records = tuple(
        (f"images/{name}/{image}", (label,))
        for label, name in enumerate(names)
        for image in list_images(path / "images" / name)
    )
    return Files(
        folder=path,
        records=records,
        classes=names,
        members=tuple(shared[name] for name in names),
        border=BORDER,
    )


def read_map(
    mappings: pathlib.Path,
) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...]]:
    """ObjectNet's own class map, from the four files of its download.

    A class has a label text, that text the texts of classes of ImageNet, each of these
    a line in the list of ILSVRC 2012, and that line's number a label of ImageNet. The
    numbers count lines from 0 or from 1: their least one decides.

    Returns:
        Labels of ImageNet by image folder, for folders that have some; and all folders.
    Raises:
        OSError, ValueError, KeyError: a file is missing or does not fit the others.
    """
    label_of = _read(mappings, "folder_to_objectnet_label.json")
    texts_of = _read(mappings, "objectnet_to_imagenet_1k.json")
    numbers = _read(mappings, "pytorch_to_imagenet_2012_id.json")
    lines = (mappings / "imagenet_to_label_2012_v2").read_text().splitlines()
    lines = [line.strip() for line in lines]
    first = min(numbers.values())
    whole = set(range(first, first + CLASSES))
    if first not in (0, 1) or set(numbers.values()) != whole or len(lines) != CLASSES:
        raise ValueError(
            f"{len(lines)} lines of labels and {len(set(numbers.values()))} numbers "
            f"from {first} on; want {CLASSES} lines, each numbered once from 0 or 1"
        )
    label_at = {number - first: int(label) for label, number in numbers.items()}
    shared = {}
    for folder, label in label_of.items():
        if label in texts_of:
            texts = texts_of[label].split("; ")
            shared[folder] = tuple(label_at[_line(lines, text)] for text in texts)
    if strangers := set(texts_of) - set(label_of.values()):
        raise ValueError(f"{min(strangers)!r} is in the class map, and has no folder")
    return shared, tuple(sorted(label_of))


def _line(lines: list[str], text: str) -> int:
    # ImageNet has classes called alike: crane, the bird and the machine.
    if lines.count(text) != 1:
        raise ValueError(f"{text!r} is {lines.count(text)} lines of labels; want one")
    return lines.index(text)


def _read(mappings: pathlib.Path, name: str) -> dict:
    return json.loads((mappings / name).read_text())
