# SPDX-License-Identifier: Apache-2.0
"""Scanned digits that scikit-learn ships: labelled data without a download."""

import dataclasses
import gzip
from typing import ClassVar

import numpy as np

from mim_jax.data.sources.packaged import GreyDigits, locate

# A line has 64 pixels of 0 to 16 and the digit. To import scikit-learn takes a second.
FILE = "sklearn/datasets/data/digits.csv.gz"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits(GreyDigits):
    """1,797 grey images of 8 x 8 pixels, ten classes; one in five is held out."""

    called: ClassVar[str] = "digits"

    @classmethod
    def read(cls) -> tuple[np.ndarray, np.ndarray]:
        with gzip.open(locate(FILE), "rt") as lines:
            table = np.loadtxt(lines, delimiter=",")
        images = table[:, :-1].reshape(-1, 8, 8, 1)
        images = np.round(images * (255 / 16)).astype(np.uint8)
        return images, table[:, -1].astype(np.int32)
