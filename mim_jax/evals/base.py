# SPDX-License-Identifier: Apache-2.0
"""The protocol of evaluations: what one is, and what it is given."""

import abc
import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager
from typing import (
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Protocol,
    get_args,
    runtime_checkable,
)

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool
from matplotlib.figure import Figure

from mim_jax.evals.report import Number, Report, ReportError, plain
from mim_jax.objectives.base import Objective
from mim_jax.schema import ConfigError, brief, returned

Batch = dict[str, np.ndarray]
Better = Literal["higher", "lower", "neither"]
Split = Literal["train", "held_out"]


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
    """Passes over images, without augmentation, each image once.

    Use a pass in a `with` statement. Its batches have "image" (uint8 "b h w c"),
    "label" (int32 "b", -1 if unknown), "index" (of the record in its source), "valid"
    (False on rows that are padding or could not be decoded), and whatever else the
    examples of the source have.
    """

    def train(self, spread: bool = False) -> AbstractContextManager[Iterable[Batch]]:
        """One pass over the training images.

        Args:
            spread: whether records that are sorted by class come one of each class,
                then a second of each, and so on: ask for it if you read only some.
        """
        ...

    def held_out(self, spread: bool = False) -> AbstractContextManager[Iterable[Batch]]:
        """One pass over the held-out images; `spread` is as for `train`."""
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

    def known(self, hidden: Bool[np.ndarray, "b n"]) -> dict[str, float]:
        """What the source knows of predicting hidden patches of the first b held-out
        images, as `Source.known` says; {} if it knows nothing."""
        ...

    def name_of(self, split: Split, index: int) -> str:
        """What a reader finds the record with this value of "index" by."""
        ...

    def objects(self, split: Split, index: int, shape: tuple[int, int]) -> Any:
        """The objects of a record, a `mim_jax.data.segments.Objects`.

        Args:
            index: its value of "index".
            shape: rows and columns of its image.
        Raises:
            ValueError: the record says nothing of objects.
        """
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of labels; () if unlabelled."""
        ...

    @property
    def object_classes(self) -> tuple[str, ...]:
        """Names of the classes of objects; () if there are no objects."""
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
    better: Better
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
        if not isinstance(cls.description, str):
            raise TypeError(
                f"{cls.__name__}.description is {brief(cls.description)}: want a str"
            )
        if (
            not isinstance(cls.headlines, tuple)
            or isinstance(cls.headlines, Headline)  # which is a tuple itself
            or not all(isinstance(one, Headline) for one in cls.headlines)
        ):
            raise TypeError(
                f"{cls.__name__}.headlines is {brief(cls.headlines)}: want a tuple "
                "of Headline, such as (Headline(KEY, TITLE, UNIT, BETTER, MEANING),)"
            )
        for one in cls.headlines:
            if one.better not in get_args(Better):
                raise TypeError(
                    f"{cls.__name__}.headlines: better={one.better!r} of {one.key!r}: "
                    f"want one of {', '.join(get_args(Better))}"
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

    def sentence(self, report: Report) -> str:
        """What a report says in a few words, beside its baselines, for the last line of
        a training run; "" for nothing."""
        del report
        return ""


def measured(evaluation: Eval, run: Run, data: Passes) -> Report:
    """What an evaluation measures of a run, checked.

    Records that cannot be read are left out of a measurement; the report counts them as
    "unreadable_train" and "unreadable_held_out", and has their names as arrays.

    Raises:
        ConfigError: `measure` returned no report, or put something else than numbers
            and arrays into one; the message names class and method.
        ValueError: the data cannot be measured, or a parameter is not finite.
    """
    _check_parameters(run)
    author, passes = f"{type(evaluation).__name__}.measure", _Noting(data)
    try:
        report = evaluation.measure(run, passes)
    except ReportError as error:
        raise ConfigError(f"{author}: Report: {error}") from error
    if not isinstance(report, Report):
        raise ConfigError(
            f"{author} returned {returned(report)}: want "
            "Report(numbers={NAME: Number(VALUE, UNIT)}, arrays={NAME: ARRAY})"
        )
    numbers, arrays = dict(report.numbers), dict(report.arrays)
    for split, indices in passes.unreadable.items():
        if indices:
            names = [data.name_of(split, index) for index in sorted(indices)]
            numbers[f"unreadable_{split}"] = Number(len(names), "images")
            arrays[f"unreadable_{split}"] = np.array(names)
    return Report(numbers=numbers, arrays=arrays)


def _check_parameters(run: Run) -> None:
    """ValueError unless all parameters are finite: of others any number could come."""
    leaves = [
        (path, leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(run.params)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    fine = jax.device_get(_all_finite([leaf for _, leaf in leaves]))
    bad = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, _), one in zip(leaves, fine, strict=True)
        if not one
    ]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise ValueError(
            f"{caption(run)}: the parameters {bad[0]}{more} are not finite, so nothing "
            "is measured: want another checkpoint"
        )


@jax.jit
def _all_finite(leaves: list[Any]) -> list[Any]:
    return [jnp.isfinite(leaf).all() for leaf in leaves]


class _Noting:
    """The same passes, which note the records that cannot be read.

    Attributes:
        unreadable: values of "index", by split.
    """

    def __init__(self, passes: Passes):
        self._passes = passes
        self.unreadable: dict[Split, set[int]] = {"train": set(), "held_out": set()}
        self.train_examples = passes.train_examples
        self.evaluation_set = passes.evaluation_set
        self.known = passes.known
        self.name_of = passes.name_of
        self.objects = passes.objects
        self.classes = passes.classes
        self.object_classes = passes.object_classes

    def train(self, spread: bool = False) -> AbstractContextManager[Iterable[Batch]]:
        return self._noted("train", self._passes.train(spread))

    def held_out(self, spread: bool = False) -> AbstractContextManager[Iterable[Batch]]:
        return self._noted("held_out", self._passes.held_out(spread))

    @contextlib.contextmanager
    def _noted(
        self, split: Split, given: AbstractContextManager[Iterable[Batch]]
    ) -> Iterator[Iterable[Batch]]:
        with given as batches:
            yield _Noted(batches, self.unreadable[split])


class _Noted(Iterator[Batch]):
    """The batches of a pass, and their number if that is known."""

    def __init__(self, batches: Iterable[Batch], unreadable: set[int]):
        self._batches, self._unreadable = batches, unreadable
        self._rest = iter(batches)

    def __next__(self) -> Batch:
        batch = next(self._rest)
        # Padding has no index.
        index = np.asarray(batch["index"])
        lost = index[~np.asarray(batch["valid"]) & (index >= 0)]
        self._unreadable.update(lost.tolist())
        return batch

    def __len__(self) -> int:
        return len(self._batches) if isinstance(self._batches, Sized) else 0


def drawn(evaluation: Eval, found: dict[str, Report]) -> dict[str, Figure]:
    """The figures that an evaluation draws of reports, checked.

    Args:
        found: the reports by the captions of their runs.
    Raises:
        ConfigError: `draw` returned no dict of figures.
    """
    figures = evaluation.draw({plain(run): _plain(one) for run, one in found.items()})
    if not isinstance(figures, dict) or not all(
        isinstance(name, str) and isinstance(figure, Figure)
        for name, figure in figures.items()
    ):
        raise ConfigError(
            f"{type(evaluation).__name__}.draw returned {returned(figures)}: want a "
            "dict of matplotlib Figures by name, {} for none"
        )
    return figures


def _plain(report: Report) -> Report:
    """The report with every text of its arrays as figures have to be given it."""
    texts = {
        key: np.array([plain(text) for text in one.ravel()]).reshape(one.shape)
        for key, one in report.arrays.items()
        if one.dtype.kind == "U" and one.size
    }
    return dataclasses.replace(report, arrays=report.arrays | texts)
