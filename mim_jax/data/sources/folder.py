# SPDX-License-Identifier: Apache-2.0
"""A folder of images: with a sub-folder per class, or without classes."""

import dataclasses
import functools
import hashlib
import os
import pathlib
from typing import Any, Literal

import numpy as np

from mim_jax.data.sources.base import Source, check_split
from mim_jax.schema import check_ranges, within

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
LAYOUT = "want PATH/CLASS/*.jpg, or PATH/train/CLASS/*.jpg and PATH/val/CLASS/*.jpg"


def list_images(folder: pathlib.Path) -> list[str]:
    """Names of the images directly in `folder`, sorted; suffixes in either case."""
    with _scanned(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if entry.name.lower().endswith(SUFFIXES)
            and not entry.name.startswith(".")
            and entry.is_file()
        )


def list_classes(folder: pathlib.Path) -> tuple[str, ...]:
    """Names of the sub-folders, sorted; this order gives the labels. `lost+found`,
    which the system makes at the top of a disk, is none."""
    with _scanned(folder) as entries:
        return tuple(
            sorted(
                entry.name
                for entry in entries
                if entry.is_dir()
                and not entry.name.startswith(".")
                and entry.name != "lost+found"
            )
        )


def _scanned(folder: pathlib.Path) -> Any:
    """What lies in a folder; PermissionError says what to do if it may not be seen."""
    try:
        return os.scandir(folder)
    except PermissionError as error:
        raise PermissionError(
            f"{_shown(str(folder))} may not be listed: want permission to read it, or "
            "the folder moved away from the images"
        ) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folder(Source):
    """Images at `path/train/<class>/` and `path/val/<class>/`, or at `path/<class>/`.

    A class folder may have folders of its own. Images directly in `path/train`, or in
    `path`, have no label. Files and folders whose names begin with a dot are left out.
    A run lists the folder once, when it starts: a file that vanishes later is a record
    that cannot be read, and the others keep their numbers.

    Attributes:
        path: the folder.
        split: "train" or "held_out".
        train_folder: training images below `path`. If it keeps its default and there is
            no such folder, the images of `path` itself are read.
        held_out_folder: held-out images below `path`. If it keeps its default and there
            is no such folder, `held_out_share` applies.
        held_out_share: share of each class (of all images without classes) that is held
            out, by a hash of the file's name: the same files on any machine. A class of
            two or more images loses at least one, and keeps at least one.
        channels: every image is converted to them.
    """

    path: str = ""
    split: str = "train"
    train_folder: str = "train"
    held_out_folder: str = "val"
    held_out_share: float = within(0.1, above=0, below=1)
    # This field implements the property.
    channels: Literal[1, 3] = 3  # pyright: ignore

    def __post_init__(self):
        check_split(self.split)
        check_ranges(self)
        if not self.path:
            raise ValueError(f"path is empty: name a folder of images; {LAYOUT}")
        if "://" in self.path:
            raise ValueError(
                f"path={self.path!r}: want a folder of a file system; mount a bucket, "
                "or prepare its images as a data set for the source tfds"
            )
        if not pathlib.Path(self.path).is_dir():
            raise FileNotFoundError(f"path={self.path!r} is no folder; {LAYOUT}")
        for name in dict.fromkeys((self._train, self._name)):
            if not (pathlib.Path(self.path) / name).is_dir():
                raise FileNotFoundError(
                    f"no folder {name!r} in {self.path!r}; {LAYOUT}, or set"
                    f" train_folder={self.train_folder!r} and"
                    f" held_out_folder={self.held_out_folder!r} to yours"
                )
        own = self._folders
        if self._name != self._train:
            own = self._folders_of(self._name)
        unknown = sorted(set(own) - set(self._folders))
        if unknown:
            raise ValueError(
                f"classes {[*map(_shown, unknown[:5])]} of {self._root} are not in"
                f" {self._train!r}, whose sub-folders define the labels; move"
                " them out or add them there"
            )
        beside = list_images(pathlib.Path(self._root))
        if own and beside:
            raise ValueError(
                f"{self._root} has both class folders and images beside them, e.g."
                f" {beside[0]!r}; move those into a class"
            )
        if not self._records:
            raise FileNotFoundError(
                f"no image in {self._root}; {LAYOUT}, suffixes {' '.join(SUFFIXES)}"
                if self.split == "train" or not self._shares
                else f"{self._root} has too few images to hold some out: want two or"
                f" more of a class, or a folder {self.held_out_folder!r}"
            )

    @functools.cached_property
    def _train(self) -> str:
        """Name of the folder with training images; "" is `path` itself."""
        names = {self.train_folder, self.held_out_folder}
        if self.train_folder == _default("train_folder") and not any(
            (pathlib.Path(self.path) / name).is_dir() for name in names
        ):
            return ""
        return self.train_folder

    @functools.cached_property
    def _shares(self) -> bool:
        """Whether both splits share one folder."""
        held_out = self.held_out_folder
        here = pathlib.Path(self.path)
        return held_out == _default("held_out_folder") and (
            not self._train
            or ((here / self._train).is_dir() and not (here / held_out).is_dir())
        )

    @property
    def _name(self) -> str:
        """Name of the folder that this split reads; "" is `path` itself."""
        own = self.split == "train" or self._shares
        return self._train if own else self.held_out_folder

    @functools.cached_property
    def _root(self) -> str:
        return str(pathlib.Path(self.path) / self._name)

    @functools.cached_property
    def _records(self) -> list[tuple[str, int]]:
        root = pathlib.Path(self._root)
        found = {-1: list_images(root)} | {
            label: [f"{name}/{image}" for image in _below(root / name)]
            for label, name in enumerate(self._folders)
        }
        if self._shares:
            found = {label: self._part(names) for label, names in found.items()}
        return [(name, label) for label, names in found.items() for name in names]

    def _part(self, names: list[str]) -> list[str]:
        """This split's part of the images of a class."""
        count = min(max(1, round(self.held_out_share * len(names))), len(names) - 1)
        ranked = sorted(names, key=_hash)
        held_out = set(ranked[: max(count, 0)])
        return [name for name in names if (name in held_out) == (self.split != "train")]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, label = self._records[index]
        # pathlib would take as long to join the names as reading the file takes.
        with open(f"{self._root}/{name}", "rb") as file:
            return {"image": file.read(), "label": label}

    def name_of(self, index: int) -> str:
        return _shown(f"{self._root}/{self._records[index][0]}")

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(map(_shown, self._folders))

    @functools.cached_property
    def _folders(self) -> tuple[str, ...]:
        """The names of the classes as the file system has them."""
        return self._folders_of(self._train)

    def _folders_of(self, name: str) -> tuple[str, ...]:
        """The names of the class folders below a folder of `path`."""
        here = pathlib.Path(self.path) / name
        folders = list_classes(here)
        if name:
            return folders
        # Beside a user's own classes there may be anything else.
        return tuple(one for one in folders if any(_below(here / one)))

    @property
    def note(self) -> str:
        if not self._shares:
            return ""
        whole = "each class" if self._folders else "the images"
        return (
            f"{self.held_out_share:.0%} of {whole} held out, since there is no folder "
            f"{self.held_out_folder!r}"
        )

    def labels(self) -> np.ndarray:
        return np.array([label for _, label in self._records], np.int32)

    def held_out(self) -> "Folder":
        return dataclasses.replace(self, split="held_out")

    def fingerprint(self) -> dict[str, Any]:
        names = "\n".join(f"{name} {label}" for name, label in self._records)
        return {
            "name": "folder",
            "split": self.split,
            "count": len(self),
            "files": hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest(),
        }

    def __getstate__(self) -> dict[str, Any]:
        # A worker that listed the folder anew would number the files anew.
        listed = {"_folders": self._folders, "_records": self._records}
        return {**super().__getstate__(), **listed, "_root": self._root}


def _hash(name: str) -> bytes:
    return hashlib.sha256(os.fsencode(name)).digest()


def _default(field: str) -> Any:
    return Folder.__dataclass_fields__[field].default


def _below(folder: pathlib.Path) -> list[str]:
    """Names of all images below `folder`, with the folders between; sorted in each."""
    if not folder.is_dir():
        return []
    return list_images(folder) + [
        f"{name}/{image}"
        for name in list_classes(folder)
        if not (folder / name).is_symlink()  # it may lead back here
        for image in _below(folder / name)
    ]


def _shown(name: str) -> str:
    """A name of the file system as text; what is not UTF-8 in it becomes "\ufffd"."""
    return os.fsencode(name).decode(errors="replace")
