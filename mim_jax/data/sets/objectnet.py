# SPDX-License-Identifier: Apache-2.0
"""ObjectNet, from its download, with the class map that comes with it."""

import json
import pathlib

from mim_jax.data.sets.base import Files, check_class_folders, find_folder
from mim_jax.data.sets.imagenet import CLASSES
from mim_jax.data.sources.base import Source
from mim_jax.data.sources.folder import list_classes, list_images

FOLDERS, SHARED = 313, 113
BORDER = 2  # pixels of red frame, by which the authors recognise copied images
_LAYOUT = "images/FOLDER/*.png and mappings/*, as objectnet-1.0.zip has them"


def objectnet(entry: str, folder: str, source: Source) -> Files:
    """The images of the 113 classes that ImageNet has, too.

    A class of ObjectNet may correspond to several of ImageNet: a bicycle to both kinds
    of bicycles. Images of the other 200 classes are not read.

    Args:
        folder: objectnet-1.0, which has images and mappings; "": OBJECTNET_DIR names
            it.
    Raises:
        ValueError: there is no such folder, or it does not have 313 classes, 113 of
            them shared with ImageNet.
    """
    del source
    path = find_folder(entry, folder, _LAYOUT, "OBJECTNET_DIR")
    for part in ("images", "mappings"):
        find_folder(entry, str(path / part), _LAYOUT)
    try:
        shared, folders = read_map(path / "mappings")
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"set {entry!r}: {path / 'mappings'}: {error}") from error
    if (len(folders), len(shared)) != (FOLDERS, SHARED):
        raise ValueError(
            f"set {entry!r}: {path / 'mappings'} has {len(folders)} classes, "
            f"{len(shared)} of them in ImageNet; want {FOLDERS} and {SHARED}"
        )
    check_class_folders(entry, path / "images", list_classes(path / "images"), folders)
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

    The files form a chain: from the folder of a class to its label text, from there to
    texts of classes of ImageNet, from each text to its line in the list of ILSVRC 2012,
    and from the line's number to a label of ImageNet. The lines are numbered from 0 or
    from 1, whichever is the least number in the file.

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
    # Classes of ImageNet share names: crane is a bird and a machine.
    if lines.count(text) != 1:
        raise ValueError(f"{text!r} is {lines.count(text)} lines of labels; want one")
    return lines.index(text)


def _read(mappings: pathlib.Path, name: str) -> dict:
    return json.loads((mappings / name).read_text())
