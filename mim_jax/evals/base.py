# SPDX-License-Identifier: Apache-2.0
"""What an evaluation is: a measurement of a run, on images of its source."""

import abc
import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from matplotlib.figure import Figure

from mim_jax.objectives.base import Objective


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A trained model with all that evaluations need to know of it.

    Attributes:
        objective: built from the run's own config.
        params: parameters, with the blocks stacked or not, as they were trained.
        stats: running statistics, {} without any.
        initial: new parameters by the run's seed: those that it started from, unless
            it began with another run's.
        step: of the checkpoint.
        name: of the run, for captions.
    """

    objective: Objective
    params: Any
    stats: Any = dataclasses.field(default_factory=dict)
    initial: Any
    step: int
    name: str


class Number(NamedTuple):
    """A measured number.

    Attributes:
        value: finite or not, never missing.
        unit: "dB", "share" (0..1), "1" for pure numbers ...
        n: of how many examples it is the mean, None if it is no mean.
        interval: 95 % confidence interval of a mean over a sample.
    """

    value: float | int
    unit: str
    n: int | None = None
    interval: tuple[float, float] | None = None


def mean_of(values: Sequence | np.ndarray, unit: str) -> Number:
    """Mean of a sample, its interval by Student's t."""
    from scipy import stats  # slow to import: only when it is used

    values = np.asarray(values, np.float64)
    mean, n = float(values.mean()), len(values)
    interval = None
    if n > 1 and np.isfinite(values).all():
        half = float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / n**0.5)
        interval = (mean - half, mean + half)
    return Number(mean, unit, n, interval)


def share_of(right: Sequence | np.ndarray) -> Number:
    """Share of True, its interval by Wilson's score."""
    from scipy import stats

    right = np.asarray(right, bool)
    found = stats.binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    interval = (float(found.low), float(found.high))
    return Number(float(right.mean()), "share", len(right), interval)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What an evaluation found of one run.

    Attributes:
        numbers: by name, the unit being part of the name where it is not a share.
        arrays: what the figures are drawn from, and values per example.
    """

    numbers: dict[str, Number]
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def scalars(self) -> dict[str, float | int]:
        """The values alone."""
        return {name: number.value for name, number in self.numbers.items()}


Batch = dict[str, np.ndarray]


@runtime_checkable
class SetPasses(Protocol):
    """Passes over an evaluation set, as `Passes.evaluation_set` gives them."""

    @property
    def images(self) -> Any:
        """What the labels mean: `mim_jax.data.sets.base.EvaluationSet`, of whose
        attributes evaluations read classes, members, model_classes and pairs."""
        ...

    def batches(self) -> AbstractContextManager[Iterable[Batch]]:
        """One pass. For "label" there is "labels", int32 "b l": positions in the set's
        classes, -1 fills."""
        ...


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

    def evaluation_set(self, entry: str) -> SetPasses:
        """Images besides those of the source, by "NAME" or "NAME=FOLDER".

        Raises:
            ValueError: unknown name, or the set is not there or not whole.
        """
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of labels; () if unlabelled."""
        ...


class Eval(abc.ABC):
    """A measurement: a frozen dataclass, whose fields are its config."""

    @abc.abstractmethod
    def check_objective(self, objective: Objective) -> None:
        """ValueError if this cannot be measured on runs of that objective."""

    def check_data(self, objective: Objective, data: Passes) -> None:
        """ValueError if data that this reads besides the run's own are not there, or do
        not fit the objective; asked for before hours of training."""
        del objective, data

    @abc.abstractmethod
    def measure(self, run: Run, data: Passes) -> Report:
        """Measure a run on the data of its config."""

    @abc.abstractmethod
    def draw(self, found: dict[str, Report]) -> dict[str, Figure]:
        """Figures by name, of the reports of one or several runs by their captions."""


def caption(run: Run) -> str:
    """How a run is called in figures and tables."""
    return f"{run.name}, step {run.step}"


def save(
    folder: pathlib.Path, name: str, found: dict[str, Report], pictures: dict
) -> None:
    """Write the numbers as NAME.json and a PNG per figure; print the numbers.

    Of several runs, NAME.json has one group for each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = {run: report.scalars for run, report in found.items()}
    shown = next(iter(values.values())) if len(values) == 1 else values
    (folder / f"{name}.json").write_text(json.dumps(shown, indent=2) + "\n")
    for title, figure in pictures.items():
        figure.savefig(folder / f"{title}.png")
    for run, scalars in values.items():
        if len(values) > 1:
            print(run)
        for key, value in scalars.items():
            print(f"{key:32s} {value:.6g}")
    print(f"report in {folder}", flush=True)


def watched(
    batches: Iterable[Batch], what: str, most: int | None = None
) -> Iterator[Batch]:
    """The batches of a pass, unchanged, with a bar that counts their images.

    The bar stands on stderr while that is a terminal, and goes with the pass;
    elsewhere nothing is written.

    Args:
        what: the caption.
        most: the caller leaves the pass after that many images.
    """
    # Asked before the first is taken: the length of `Batches` is what is left.
    count = len(batches) if isinstance(batches, Sized) else None
    with tqdm.tqdm(
        desc=what, unit=" images", leave=False, disable=None, dynamic_ncols=True
    ) as bar:
        for batch in batches:
            rows = len(batch["valid"])
            if count is not None and bar.total is None:
                bar.reset(count * rows if most is None else min(count * rows, most))
            yield batch
            bar.update(rows)


def keys_of(batch: Batch, seed: int, number: int = 0) -> jax.Array:
    """A key for each image of a batch, whatever batch it comes in.

    Args:
        seed: of the evaluation.
        number: of the draw, where an image gets several.
    """
    base = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), number)
    indices = jnp.asarray(batch["index"], jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(base, indices)


def show(axis: Any, image: np.ndarray, title: str = "", colour: str = "black") -> None:
    """An image in 0..1 or uint8 on an axis without ticks."""
    image = image[..., 0] if image.shape[-1] == 1 else image
    top = 255 if image.dtype == np.uint8 else 1
    axis.imshow(image, cmap="gray", vmin=0, vmax=top, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(title, fontsize=8, color=colour)
