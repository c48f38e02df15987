# SPDX-License-Identifier: Apache-2.0
"""What an evaluation set is: images, and which classes of a model are right."""

import abc
import dataclasses
import os
import pathlib
from typing import Any

from mim_jax.data.sources.base import Source
from mim_jax.data.sources.few import Few
from mim_jax.data.sources.tfds import Tfds


class EvaluationSet(abc.ABC):
    """Images to classify. A concrete set is a dataclass.

    A set has classes of its own, and says which classes of the model count as each.

    Attributes:
        classes: names of the set's own classes, in the order of its labels.
        members: for each of them, the classes of the model that count as it.
        model_classes: how many classes the model must have.
        labels: the most labels that an image can have.
        pairs: False: any label of an image is right. True: an image has two labels,
            one for its shape and one for its texture.
        border: pixels to cut off each side of a decoded image.
    """

    classes: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]
    model_classes: int
    labels: int = 1
    pairs: bool = False
    border: int = 0

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of images, at least 1."""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> dict[str, Any]:
        """Image `index`; asking twice gives the same.

        Returns:
            `image`: uint8 array of rows, columns, channels, or an encoded image as
            bytes. `labels`: positions in `classes`; () for an image to leave out.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files(EvaluationSet):
    """Image files in a folder, listed once.

    Attributes:
        folder: names of files are relative to it.
        records: name of each file, and its labels.
    """

    folder: pathlib.Path
    records: tuple[tuple[str, tuple[int, ...]], ...]
    classes: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]
    model_classes: int = 1000
    labels: int = 1
    pairs: bool = False
    border: int = 0

    def __post_init__(self):
        if not self.records:
            raise ValueError(f"no image in {self.folder}; want JPEG or PNG files there")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, labels = self.records[index]
        return {"image": (self.folder / name).read_bytes(), "labels": labels}


def data_dir_of(source: Source) -> str | None:
    """Folder of the tfds data sets of a run; None: TFDS looks in its own."""
    while isinstance(source, Few):
        source = source.source
    return source.data_dir if isinstance(source, Tfds) else None


def find_folder(
    entry: str, folder: str, layout: str, variable: str = ""
) -> pathlib.Path:
    """The folder of `NAME=FOLDER`.

    Args:
        entry: NAME.
        folder: FOLDER; "": the environment variable names it.
        layout: what the folder holds.
        variable: name of the environment variable; "": there is none.
    Raises:
        ValueError: there is no such folder; the message shows the layout.
    """
    folder = folder or os.environ.get(variable, "")
    path = pathlib.Path(folder).expanduser()
    if not folder or not path.is_dir():
        what = f"no folder {folder!r}" if folder else "no folder is named"
        also = f", or its name in the environment variable {variable}"
        raise ValueError(
            f"set {entry!r}: {what}; want '{entry}=FOLDER' with {layout}"
            + (also if variable else "")
        )
    return path


def check_no_folder(entry: str, folder: str) -> None:
    """ValueError if a folder is named for a set that the program makes itself."""
    if folder:
        raise ValueError(
            f"set '{entry}={folder}': the program makes {entry} itself; want {entry!r}"
        )


def check_class_folders(
    entry: str, path: pathlib.Path, found: tuple[str, ...], wanted: tuple[str, ...]
) -> None:
    """Checks that the sub-folders of a folder are the classes of the set.

    Raises:
        ValueError: they are not; the message has both counts and examples of missing
            and unknown names.
    """
    missing = [name for name in wanted if name not in set(found)]
    unknown = [name for name in found if name not in set(wanted)]
    if missing or unknown:
        raise ValueError(
            f"set {entry!r}: {path} has {len(found)} class folders, want its "
            f"{len(wanted)} classes"
            + (f"; missing: {_short(missing)}" if missing else "")
            + (f"; unknown: {_short(unknown)}" if unknown else "")
        )


def _short(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
