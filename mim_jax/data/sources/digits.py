# SPDX-License-Identifier: Apache-2.0
"""Scanned digits that scikit-learn ships: labelled data without a download."""

import dataclasses
import functools
from typing import Any

import numpy as np

from mim_jax.data.sources.base import Source, check_split


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits(Source):
    """1,797 grey images of 8 x 8 pixels, ten classes; one in five is held out."""

    split: str = "train"  # "train" | "held_out"

    def __post_init__(self):
        check_split(self.split)

    @functools.cached_property
    def _data(self) -> tuple[np.ndarray, np.ndarray]:
        from sklearn import datasets  # slow to import, so only when digits are read

        digits: Any = datasets.load_digits()
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
        labels = digits.target.astype(np.int32)
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

    def held_out(self) -> "Digits":
        return dataclasses.replace(self, split="held_out")

    def fingerprint(self) -> dict[str, Any]:
        return {"name": "digits", "split": self.split, "count": len(self)}
