# SPDX-License-Identifier: Apache-2.0
"""A folder of images, one sub-folder per class."""

import dataclasses
import functools
import hashlib
import os
import pathlib
from typing import Any

import numpy as np

from mim_jax.data.sources.base import Source, check_split

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
LAYOUT = "want PATH/train/CLASS/*.jpg and PATH/val/CLASS/*.jpg"


def list_images(folder: pathlib.Path) -> list[str]:
    """Names of the images directly in `folder`, sorted; suffixes in either case."""
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if entry.name.lower().endswith(SUFFIXES)
            and not entry.name.startswith(".")
            and entry.is_file()
        )


def list_classes(folder: pathlib.Path) -> tuple[str, ...]:
    """Names of the sub-folders, sorted; this order gives the labels."""
    with os.scandir(folder) as entries:
        return tuple(
            sorted(
                entry.name
                for entry in entries
                if entry.is_dir() and not entry.name.startswith(".")
            )
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folder(Source):
    """Images at `path/train/<class>/*` and `path/val/<class>/*`, or without classes.

    Images that lie directly in `path/train` have no label. Each process lists the
    folder once, so do not change it while a run reads it.
    """

    path: str = ""
    split: str = "train"  # "train" | "held_out"
    train_folder: str = "train"
    held_out_folder: str = "val"
    # 1 or 3: every image is converted to it. This field implements the property.
    channels: int = 3  # pyright: ignore

    def __post_init__(self):
        check_split(self.split)
        if not self.path:
            raise ValueError(f"path is empty: name a folder of images; {LAYOUT}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels={self.channels}: want 1 (grey) or 3 (colour)")
        for name in dict.fromkeys((self.train_folder, self._folder.name)):
            if not (pathlib.Path(self.path) / name).is_dir():
                raise FileNotFoundError(
                    f"no folder {name!r} in {self.path!r}; {LAYOUT}, or set"
                    f" train_folder={self.train_folder!r} and"
                    f" held_out_folder={self.held_out_folder!r} to yours"
                )
        unknown = sorted(set(list_classes(self._folder)) - set(self.classes))
        if unknown:
            raise ValueError(
                f"classes {unknown[:5]} of {self._folder} are not in"
                f" {self.train_folder!r}, whose sub-folders define the labels; move"
                " them out or add them there"
            )
        if list_classes(self._folder) and list_images(self._folder):
            raise ValueError(
                f"{self._folder} has both class folders and images beside them, e.g."
                f" {list_images(self._folder)[0]!r}; move those into a class"
            )
        if not self._records:
            raise FileNotFoundError(
                f"no image in {self._folder}; {LAYOUT}, suffixes {' '.join(SUFFIXES)}"
            )

    @property
    def _folder(self) -> pathlib.Path:
        train = self.split == "train"
        name = self.train_folder if train else self.held_out_folder
        return pathlib.Path(self.path) / name

    @functools.cached_property
    def _root(self) -> str:
        return str(self._folder)

    @functools.cached_property
    def _records(self) -> list[tuple[str, int]]:
        records = [(name, -1) for name in list_images(self._folder)]
        for label, name in enumerate(self.classes):
            if (self._folder / name).is_dir():
                images = list_images(self._folder / name)
                records += [(f"{name}/{image}", label) for image in images]
        return records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, label = self._records[index]
        # pathlib would take as long to join the names as reading the file takes.
        with open(f"{self._root}/{name}", "rb") as file:
            return {"image": file.read(), "label": label}

    @property
    def classes(self) -> tuple[str, ...]:
        return self._classes

    @functools.cached_property
    def _classes(self) -> tuple[str, ...]:
        return list_classes(pathlib.Path(self.path) / self.train_folder)

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
            "files": hashlib.sha256(names.encode()).hexdigest(),
        }
