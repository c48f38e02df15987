# SPDX-License-Identifier: Apache-2.0
"""What an evaluation is: a measurement of a run, on batches of a source."""

import abc
import dataclasses
import json
import pathlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import numpy as np
from matplotlib.figure import Figure

from mim_jax.objectives.base import Objective


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A trained model with all that evaluations need to know of it.

    Attributes:
        objective: built from the run's own config.
        params: parameters per block.
        initial: the parameters that the run started from.
        step: of the checkpoint.
        name: of the run, for captions.
    """

    objective: Objective
    params: Any
    initial: Any
    step: int
    name: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What an evaluation found.

    Attributes:
        scalars: numbers by name, the unit being part of the name.
        pictures: figures by name, saved as NAME.png.
        arrays: per-example values by name.
    """

    scalars: dict[str, float | int]
    pictures: dict[str, Figure] = dataclasses.field(default_factory=dict)
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def save(self, folder: pathlib.Path, name: str) -> None:
        """Write NAME.json and one PNG per picture; print the numbers."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(self.scalars, indent=2) + "\n")
        for title, figure in self.pictures.items():
            figure.savefig(folder / f"{title}.png")
        for key, value in self.scalars.items():
            print(f"{key:32s} {value:.6g}")
        print(f"report in {folder}", flush=True)


Batch = dict[str, np.ndarray]


@runtime_checkable
class Passes(Protocol):
    """Passes over images, in order, without augmentation, each image once.

    A pass is to be used in a `with` statement, and gives batches with "image" (uint8
    "b h w c"), "label" (-1: unknown), "index" and "valid", False on padding.
    """

    def train(self) -> AbstractContextManager[Iterable[Batch]]:
        """One pass over the images that the run learned from."""
        ...

    def held_out(self) -> AbstractContextManager[Iterable[Batch]]:
        """One pass over the images held out."""
        ...

    def train_examples(self, indices: Sequence[int]) -> Batch:
        """Those training images as one batch, by their "index"."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of labels; () if unlabelled."""
        ...


class Eval(abc.ABC):
    """A measurement: a frozen dataclass, whose fields are its config."""

    @abc.abstractmethod
    def check(self, objective: Objective) -> None:
        """ValueError if this cannot be measured on runs of that objective."""

    @abc.abstractmethod
    def measure(self, run: Run, data: Passes) -> Report:
        """Measure a run on the data of its config."""
