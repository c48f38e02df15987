# SPDX-License-Identifier: Apache-2.0
"""Some classes of another source, such as ImageNet-100's of ImageNet."""

import dataclasses
import functools
import hashlib
import os
import pathlib
from typing import Any

import numpy as np

from mim_jax.data.fields import Fields
from mim_jax.data.sources.base import Source
from mim_jax.schema import to_json


def read_names(file: str) -> tuple[str, ...]:
    """The names in a class-list file: the first word of each line that has one. What
    follows on the line, such as a readable name, and lines that begin with "#" are
    ignored.

    Raises:
        ValueError: there is no such file, or it is not text.
    """
    try:
        lines = pathlib.Path(file).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"file={file!r}: {error}: want a text file with the name of a class on "
            "each line"
        ) from error
    words = [line.split() for line in lines]
    return tuple(found[0] for found in words if found and found[0][0] != "#")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfClasses(Source):
    """The records of `source` whose class is in a list, which also numbers the labels.
    The held-out split is that of `source`, with the same classes.

    Choosing needs the label of every record. `folder` and the embedded sources know
    them. `tfds` stores labels beside the images, so the whole data set is read once
    (ImageNet: 140 GB). To read it only once and for all, name an `index` file.

    Attributes:
        source: to choose from.
        names: of classes of `source`, at least 2, each once. For ImageNet of TFDS these
            are WordNet ids, as "n01440764".
        file: if set, a text file with a name on each line, instead of `names`.
        index: if set, where a run keeps the positions of the chosen records: a path
            that ends with .npz. Each split has a file of its own there. Hosts that
            start at the same time write the same.
    """

    source: Source
    names: tuple[str, ...] = ()
    file: str = ""
    index: str = ""

    def __post_init__(self):
        if bool(self.names) == bool(self.file):
            raise ValueError(
                f"names={self.names[:3]}, file={self.file!r}: want the one or the other"
            )
        if self.index and not self.index.endswith(".npz"):
            raise ValueError(f"index={self.index!r}: want a path that ends with .npz")
        known, names = self.source.classes, self.classes
        where = f"file={self.file!r}" if self.file else "names"
        unknown = [name for name in names if name not in set(known)]
        if unknown:
            raise ValueError(
                f"{where}: {unknown[0]!r} is no class of the source "
                f"({len(unknown)} of {len(names)} are not); known: "
                f"{', '.join(known[:3]) or 'none'}{', ...' if known[3:] else ''}"
            )
        if len(names) < 2 or len(set(names)) < len(names):
            raise ValueError(
                f"{where}: {len(names)} names, {len(set(names))} different ones: want "
                "at least 2, each once"
            )

    @property
    def classes(self) -> tuple[str, ...]:
        return self._names

    @functools.cached_property
    def _names(self) -> tuple[str, ...]:
        return self.names or read_names(self.file)

    @functools.cached_property
    def _places(self) -> np.ndarray:
        """int64 of 2, n: each record's position in `source`, and its label here."""
        if self.index and self._kept.exists():
            with np.load(self._kept, allow_pickle=False) as saved:
                return saved["places"]
        return self._find()

    @property
    def _kept(self) -> pathlib.Path:
        # The two splits of a data set must not share a file.
        digest = hashlib.sha256(to_json(self._about, sort_keys=True).encode())
        path = pathlib.Path(self.index)
        return path.with_name(f"{path.stem}-{digest.hexdigest()[:12]}.npz")

    def keep(self) -> None:
        for split in (self, self.held_out()) if self.index else ():
            path = split._kept
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_name(f"{path.stem}-{os.getpid()}.tmp.npz")
                np.savez(temporary, places=split._places)
                temporary.replace(path)

    def _find(self) -> np.ndarray:
        label_of = {name: label for label, name in enumerate(self.classes)}
        # The last entry is that of label -1: unknown.
        label_here = [label_of.get(name, -1) for name in self.source.classes] + [-1]
        labels = np.array(label_here)[self.source.labels()]
        places = np.flatnonzero(labels >= 0)
        if not len(places):
            raise ValueError("no record of the source has one of these classes")
        return np.stack([places, labels[places]])

    def __len__(self) -> int:
        return self._places.shape[1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        place, label = self._places[:, index]
        return {**self.source[int(place)], "label": int(label)}

    def name_of(self, index: int) -> str:
        return self.source.name_of(int(self._places[0, index]))

    @property
    def channels(self) -> int:
        return self.source.channels

    def fields(self) -> Fields:
        return self.source.fields()

    def labels(self) -> np.ndarray:
        return self._places[1].astype(np.int32)

    def held_out(self) -> "OfClasses":
        return dataclasses.replace(self, source=self.source.held_out())

    @property
    def _about(self) -> dict[str, Any]:
        return {"names": self.classes, "source": self.source.fingerprint()}

    def fingerprint(self) -> dict[str, Any]:
        names = hashlib.sha256(to_json(self.classes).encode()).hexdigest()
        source = self.source.fingerprint()
        return {"name": "classes", "count": len(self), "names": names, "source": source}

    def __getstate__(self) -> dict[str, Any]:
        # The choice travels too, or a worker would read all labels again to make it.
        return {**super().__getstate__(), "_places": self._places}
