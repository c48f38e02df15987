# SPDX-License-Identifier: Apache-2.0
"""The protocol of evaluations: what one is, and what it is given."""

import abc
import dataclasses
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from matplotlib.figure import Figure

from mim_jax.evals.report import Report
from mim_jax.objectives.base import Objective

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A trained model, with everything that evaluations need to know about it.

    Attributes:
        objective: built from the run's own config.
        params: trained parameters, in the layout of training: blocks stacked or not.
        stats: running statistics; {} if the objective has none.
        memory: state that the masking saves between its refreshes; None without any.
        initial: parameters before training, drawn again from the run's seed. A run that
            began with another run's parameters did not start from these.
        step: of the checkpoint.
        name: of the run, for captions.
    """

    objective: Objective
    params: Any
    stats: Any = dataclasses.field(default_factory=dict)
    memory: Any = None
    initial: Any
    step: int
    name: str


def caption(run: Run) -> str:
    """The name of a run in figures and tables."""
    return f"{run.name}, step {run.step}"


@runtime_checkable
class SetPasses(Protocol):
    """Passes over an evaluation set; `Passes.evaluation_set` returns one."""

    @property
    def images(self) -> Any:
        """The set, a `mim_jax.data.sets.base.EvaluationSet`. Evaluations read its
        classes, members, model_classes and pairs, which say what its labels mean."""
        ...

    def batches(self) -> AbstractContextManager[Iterable[Batch]]:
        """One pass. Batches have "labels" (int32 "b l": positions in the set's classes,
        -1 where an image has fewer than l) instead of "label"."""
        ...


@runtime_checkable
class Passes(Protocol):
    """Passes over images in order, without augmentation, each image once.

    Use a pass in a `with` statement. Its batches have "image" (uint8 "b h w c"),
    "label" (int32 "b", -1 if unknown), "index" (of the record in its source), "valid"
    (False on rows that are padding or could not be decoded), and whatever else the
    examples of the source have.
    """

    def train(self) -> AbstractContextManager[Iterable[Batch]]:
        """One pass over the training images."""
        ...

    def held_out(self) -> AbstractContextManager[Iterable[Batch]]:
        """One pass over the held-out images."""
        ...

    def train_examples(self, indices: Sequence[int]) -> Batch:
        """The training images with these values of "index", as one batch."""
        ...

    def evaluation_set(self, entry: str) -> SetPasses:
        """Images from outside the source, by "NAME" or "NAME=FOLDER".

        Raises:
            ValueError: the name is unknown, or the set is missing or incomplete.
        """
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of labels; () if unlabelled."""
        ...


class Headline(NamedTuple):
    """A number of an evaluation that the compare page shows in its table.

    Attributes:
        key: a key of `Report.numbers`; or "START*", for every key that begins with
            START, each in a column of its own.
        title: of the column. "{}" is replaced by the part of the key that "*" matched.
        unit: of the number, as in `Number`.
        better: the direction of better models; "neither" if there is none.
        meaning: what the number says, in one sentence, for a reader who does not know
            the papers.
    """

    key: str
    title: str
    unit: str
    better: Literal["higher", "lower", "neither"]
    meaning: str

    def columns(self, keys: Iterable[str]) -> dict[str, str]:
        """Title by key, for those of the keys that this headline is about.

        Example:
            >>> sets = Headline("accuracy_*", "accuracy, {}", "share", "higher", "")
            >>> sets.columns(["images", "accuracy_held_out"])
            {'accuracy_held_out': 'accuracy, held out'}
        """
        if not self.key.endswith("*"):
            return {key: self.title for key in keys if key == self.key}
        start = self.key[:-1]
        return {
            key: self.title.format(key.removeprefix(start).replace("_", " "))
            for key in keys
            if key.startswith(start)
        }


class Eval(abc.ABC):
    """A measurement. A concrete one is a frozen dataclass; its fields are its config.

    Attributes:
        description: what the evaluation shows, in one or two sentences, for a reader
            who does not know the papers.
        headlines: its numbers for the table of the compare page.
    """

    description: ClassVar[str]
    headlines: ClassVar[tuple[Headline, ...]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name in ("description", "headlines"):
            if not hasattr(cls, name):
                raise TypeError(
                    f"evaluation {cls.__name__} has no class attribute {name!r}, which "
                    "the compare page shows: want `description: ClassVar[str]` and "
                    "`headlines: ClassVar[tuple[Headline, ...]]`"
                )

    @abc.abstractmethod
    def check_objective(self, objective: Objective) -> None:
        """Refuse an objective whose runs this evaluation cannot measure.

        Raises:
            ValueError: naming what the evaluation needs.
        """

    def check_data(self, objective: Objective, data: Passes) -> None:
        """Refuse data, besides the run's own images, that are missing or do not fit.

        Training calls this before it starts, so that hours of work do not end in an
        error of the report.

        Raises:
            ValueError: naming what is missing or does not fit.
        """
        del objective, data

    @abc.abstractmethod
    def measure(self, run: Run, data: Passes) -> Report:
        """Measure a run on the data of its config.

        Raises:
            ValueError: the data cannot be measured, e.g. they have no labels.
        """

    @abc.abstractmethod
    def draw(self, found: dict[str, Report]) -> dict[str, Figure]:
        """Figures by name.

        Args:
            found: the reports of one or several runs, by their captions.
        """
