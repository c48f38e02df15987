# SPDX-License-Identifier: Apache-2.0
"""Accuracy of a classifier on held-out images and on sets that differ from them."""

import dataclasses
import sys
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure

from mim_jax.evals.base import Batch, Eval, Headline, Passes, Run, SetPasses
from mim_jax.evals.figures import Panel, gallery, one_per_run
from mim_jax.evals.logits import classifier, find_set, labelled, membership, predict
from mim_jax.evals.report import Number, Report, share_of
from mim_jax.objectives.base import Objective
from mim_jax.schema import check_ranges, within

_PREFIX = "accuracy_"
_HELD_OUT = "held_out"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Robustness(Eval):
    """Top-1 and top-5 accuracy, on the held-out split and on any number of sets.

    A set may have classes of its own. Only those classes of the model compete that
    count as one of them, since a model of 1,000 classes cannot know which 200 a set
    has. A prediction is right if it counts as a right class of the image. Images
    without a right class are left out, and counted in "left_out_SET".

    Top-5 is given where more than five classes compete.

    Attributes:
        sets: "NAME" of a set that the program makes or TFDS prepared, or "NAME=FOLDER";
            docs/data.md lists them.
        skip_absent: leave out sets that are not there, or are about other classes than
            the run's, and say which; False: they are an error.
        mistakes: number of wrongly classified held-out images in the picture.
    """

    description: ClassVar[str] = (
        "Accuracy of a classifier on held-out images, and on sets of images that "
        "differ from those it was trained on."
    )
    headlines: ClassVar[tuple[Headline, ...]] = (
        Headline(
            "accuracy_*",
            "accuracy, {}",
            "share",
            "higher",
            "Share of the images of a set whose most probable class is right.",
        ),
    )

    sets: tuple[str, ...] = ()
    skip_absent: bool = False
    mistakes: int = within(12, least=0, most=1000)

    def __post_init__(self):
        check_ranges(self)
        names = [_name(entry) for entry in self.sets]
        if len(set(names)) < len(names):
            raise ValueError(f"sets={self.sets}: want each name once")

    def check_objective(self, objective: Objective) -> None:
        labelled(objective)

    def check_data(self, objective: Objective, data: Passes) -> None:
        if not data.classes:
            raise ValueError("robustness: the run's source has no labels to compare to")
        if not self.skip_absent:
            self._sets(objective, data)

    def measure(self, run: Run, data: Passes) -> Report:
        count, classify = labelled(run.objective).classes, classifier(run)
        self.check_data(run.objective, data)
        with data.held_out() as batches:
            own = (
                {**one, "labels": np.array(one["label"])[:, None]} for one in batches
            )
            found = _pass(classify, own, np.eye(count, dtype=bool), self.mistakes)
        numbers = found.numbers(_HELD_OUT)
        for name, found_set in self._sets(run.objective, data).items():
            members = membership(found_set.images.members, count)
            with found_set.batches() as batches:
                numbers |= _pass(classify, batches, members).numbers(name)
        names = np.array([*data.classes, *map(str, range(len(data.classes), count))])
        arrays = {
            "mistakes": found.mistakes,
            "mistaken": names[found.labels],
            "taken_for": names[found.taken_for],
        }
        return Report(numbers=numbers, arrays=arrays)

    def _sets(self, objective: Objective, data: Passes) -> dict[str, SetPasses]:
        found = {}
        for entry in self.sets:
            try:
                found[_name(entry)] = _find(objective, data, entry)
            except ValueError as error:
                if not self.skip_absent:
                    raise
                print(f"WARNING: left out: {error}", file=sys.stderr, flush=True)
        return found

    def draw(self, found: dict[str, Report]) -> dict[str, Figure]:
        bars = {"robustness": _bars(found)}
        return bars | one_per_run("mistakes", found, _mistakes)


def right(
    logits: Float[np.ndarray, "n c"],
    labels: Int[np.ndarray, "n l"],
    members: Bool[np.ndarray, "s c"],
    top: int = 1,
) -> Bool[np.ndarray, " n"]:
    """Whether one of an image's `top` best classes counts as a right one.

    Args:
        logits: of the model's classes; of equal ones the first is better.
        labels: right classes of the set, at least one per image; -1 fills the rest.
        members: True where a class of the model counts as one of the set; those that
            count as none do not compete.
        top: at most the number of classes that compete.

    Example:
        >>> logits = np.array([[0.1, 2.0, 1.0]])
        >>> right(logits, np.array([[2]]), np.eye(3, dtype=bool)).tolist()
        [False]
        >>> right(logits, np.array([[2]]), np.eye(3, dtype=bool), top=2).tolist()
        [True]
    """
    known = np.take(members, labels, axis=0) & (labels >= 0)[..., None]
    counts = known.any(axis=1)
    competing = np.where(members.any(axis=0), logits, -np.inf)
    best = np.argsort(-competing, axis=1, kind="stable")[:, :top]
    return np.asarray(np.take_along_axis(counts, best, axis=1).any(axis=1))


class _Pass(NamedTuple):
    """What was found on one set.

    Attributes:
        best, best5: per image, whether its first class, or one of its first five, is
            right; None for the five if no more than five classes compete.
        left_out: number of images without a right class.
        unreadable: number of records that could not be decoded.
        mistakes, labels, taken_for: wrongly classified images to show, their class and
            the class that the model answered.
    """

    best: list[bool]
    best5: list[bool] | None
    left_out: int
    unreadable: int
    mistakes: np.ndarray
    labels: np.ndarray
    taken_for: np.ndarray

    def numbers(self, name: str) -> dict[str, Number]:
        if not self.best:
            raise ValueError(f"set {name!r} has no image with a class of the model")
        numbers = {_PREFIX + name: share_of(self.best)}
        if self.best5 is not None:
            numbers[f"top5_{name}"] = share_of(self.best5)
        if self.left_out:
            numbers[f"left_out_{name}"] = Number(self.left_out, "images")
        if self.unreadable:
            numbers[f"unreadable_{name}"] = Number(self.unreadable, "images")
        return numbers


def _pass(
    classify: Callable[[Any], jax.Array],
    batches: Iterable[Batch],
    members: Bool[np.ndarray, "s c"],
    mistakes: int = 0,
) -> _Pass:
    """One pass over a set.

    Args:
        batches: with "labels" "b l", as those of an evaluation set.
        mistakes: number of wrongly classified images to return.
    """
    best, best5, left_out, unreadable = [], [], 0, 0
    shown: list[tuple] = []
    for rows, logits, lost in predict(classify, batches):
        unreadable += lost
        labels = rows["labels"]
        known = (labels >= 0).any(axis=1)
        left_out += int((~known).sum())
        labels, logits, images = labels[known], logits[known], rows["image"][known]
        hits = right(logits, labels, members)
        best += hits.tolist()
        best5 += right(logits, labels, members, top=5).tolist()
        for i in np.flatnonzero(~hits)[: mistakes - len(shown)]:
            shown.append((images[i], labels[i, 0], logits[i].argmax()))
    pictures, true, taken_for = zip(*shown, strict=True) if shown else ((), (), ())
    return _Pass(
        best,
        best5 if members.any(axis=0).sum() > 5 else None,
        left_out,
        unreadable,
        np.array(pictures),
        np.array(true, int),
        np.array(taken_for, int),
    )


def _find(objective: Objective, data: Passes, entry: str) -> SetPasses:
    found = find_set(objective, data, entry)
    if found.images.pairs:
        raise ValueError(
            f"set {entry!r} has images of two classes each; want another set here, and "
            "configs/shape_bias.py for this one"
        )
    return found


def _name(entry: str) -> str:
    return entry.partition("=")[0]


def _bars(found: dict[str, Report]) -> Figure:
    """Top-1 accuracy per set, one bar per run."""
    first = next(iter(found.values())).numbers
    names = [key.removeprefix(_PREFIX) for key in first if key.startswith(_PREFIX)]
    width = 0.8 / len(found)
    figure = Figure(figsize=(2.2 + 0.5 * len(names) * (1 + len(found)), 3.4), dpi=110)
    axis = figure.subplots()
    for number, (run, report) in enumerate(found.items()):
        shares = [report.numbers[_PREFIX + name] for name in names]
        values = np.array([share.value for share in shares])
        ends = np.array([share.interval for share in shares], float)
        places = np.arange(len(names)) + (number - (len(found) - 1) / 2) * width
        bars = axis.bar(
            places,
            100 * values,
            width,
            # A list: matplotlib before 3.11 takes an array of one column for a number.
            yerr=(100 * np.abs(ends.T - values)).tolist(),
            error_kw=dict(lw=0.8, capsize=2),
            label=run,
        )
        labels = [f"{100 * value:.0f}" for value in values]
        axis.bar_label(bars, labels, fontsize=7, label_type="center", color="white")
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    axis.set_ylim(0, 100)
    axis.set_ylabel("top-1 accuracy, % (higher is better)", fontsize=8)
    axis.set_xlabel("set of images; lines: 95 % intervals", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1))
    figure.tight_layout()
    return figure


def _mistakes(name: str, report: Report) -> Figure | None:
    arrays = report.arrays
    columns = (arrays["mistakes"], arrays["mistaken"], arrays["taken_for"])
    panels = [
        Panel(image, title=f"{true},\ntaken for {taken_for}")
        for image, true, taken_for in zip(*columns, strict=True)
    ]
    if not panels:
        return None
    title = f"{name}: held-out images with a wrong answer"
    return gallery(panels, 6, (1.6, 1.95), title)
