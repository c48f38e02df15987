# SPDX-License-Identifier: Apache-2.0
"""Whether a classifier decides by shape or by texture, where the two disagree."""

import dataclasses
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure

from mim_jax.evals.base import Eval, Headline, Passes, Run, SetPasses
from mim_jax.evals.figures import Panel, gallery, one_per_run
from mim_jax.evals.logits import classifier, find_set, labelled, membership, predict
from mim_jax.evals.report import Number, Report, share_of
from mim_jax.objectives.base import Objective
from mim_jax.schema import check_ranges, within


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapeBias(Eval):
    """Shape bias of arXiv:1811.12231: shape / (shape + texture) decisions.

    Images have the shape of one category and the texture of another. A category's
    probability is the mean over its classes, not the sum: ImageNet has 109 classes of
    dogs and one of knives. The bias leaves out decisions for neither category, and
    images whose shape and texture are of the same one.

    Attributes:
        set: "cues", drawn by the program for runs on source `cues`; or
            "cue_conflict=FOLDER", the published images, for runs on ImageNet.
        examples: number of images in the picture of decisions.
    """

    description: ClassVar[str] = (
        "Decisions of a classifier on images that have the shape of one category and "
        "the texture of another."
    )
    headlines: ClassVar[tuple[Headline, ...]] = (
        Headline(
            "shape_bias",
            "shape bias",
            "share",
            "higher",
            "Share of decisions by shape among those by shape or by texture. People "
            "nearly always decide by shape.",
        ),
    )

    set: str = "cues"
    examples: int = within(12, least=0, most=1000)

    def __post_init__(self):
        check_ranges(self)

    def check_objective(self, objective: Objective) -> None:
        labelled(objective)

    def check_data(self, objective: Objective, data: Passes) -> None:
        self._find(objective, data)

    def _find(self, objective: Objective, data: Passes) -> SetPasses:
        found = find_set(objective, data, self.set)
        if not found.images.pairs:
            raise ValueError(
                f"set={self.set!r}: its images have no texture of another class; want "
                "'cues' or 'cue_conflict=FOLDER'"
            )
        return found

    def measure(self, run: Run, data: Passes) -> Report:
        found = self._find(run.objective, data)
        names = found.images.classes
        members = membership(found.images.members, labelled(run.objective).classes)
        # Spread over the set: it may be sorted by category.
        spread = np.linspace(0, len(found.images) - 1, self.examples).round()
        pairs, decided, shown, count, unreadable = [], [], {}, 0, 0
        with found.batches() as batches:
            for rows, logits, lost in predict(classifier(run), batches):
                unreadable += lost
                conflict = rows["labels"][:, 0] != rows["labels"][:, 1]
                pairs.append(rows["labels"][conflict])
                decided.append(decisions(logits[conflict], members))
                for i in np.flatnonzero(np.isin(rows["index"][conflict], spread)):
                    shown[count + int(i)] = rows["image"][conflict][i]
                count += len(decided[-1])
        if not count:
            raise ValueError(f"set={self.set!r} has no image whose cues disagree")
        pairs, decided = np.concatenate(pairs), np.concatenate(decided)
        shape, texture = (decided == pairs[:, cue] for cue in (0, 1))
        numbers = {
            "images": Number(len(decided), "images"),
            "shape_bias": _bias(shape, texture),
            "shape_share": share_of(shape),
            "texture_share": share_of(texture),
            "neither_share": share_of(~(shape | texture)),
        }
        if unreadable:
            numbers["unreadable"] = Number(unreadable, "images")
        for label, name in enumerate(names):
            rows = pairs[:, 0] == label
            if rows.any():
                numbers[f"shape_bias_{name}"] = _bias(shape[rows], texture[rows])
        arrays = {
            "names": np.array(names),
            "pairs": pairs,
            "decided": decided,
            "head": np.array(type(run.objective).__name__),
            "chosen": np.array(list(shown), int),
            "examples": np.array(list(shown.values())),
        }
        return Report(numbers=numbers, arrays=arrays)

    def draw(self, found: dict[str, Report]) -> dict[str, Figure]:
        points = {"shape_bias": _points(found)}
        return points | one_per_run("decisions", found, _decisions)


def decisions(
    logits: Float[np.ndarray, "n c"], members: Bool[np.ndarray, "s c"]
) -> Int[np.ndarray, " n"]:
    """The category of greatest mean probability.

    Args:
        logits: of the model's classes; probabilities are taken over all of them.
        members: True where a class belongs to a category; each has at least one class.
    Source: arXiv:1811.12231; its authors' program takes the mean, not the sum.

    Example:
        >>> one_class_each = np.eye(3, dtype=bool)
        >>> decisions(np.array([[0.0, 3.0, 1.0]]), one_class_each).tolist()
        [1]
    """
    logits = logits.astype(np.float64)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = powers / powers.sum(axis=1, keepdims=True)
    means = probabilities @ members.T / members.sum(axis=1)
    return means.argmax(axis=1)


def _bias(shape: Bool[np.ndarray, " n"], texture: Bool[np.ndarray, " n"]) -> Number:
    """Share of shape among decisions for shape or texture; NaN without any."""
    either = shape | texture
    if not either.any():
        return Number(float("nan"), "share", 0)
    return share_of(shape[either])


def _points(found: dict[str, Report]) -> Figure:
    """A line per category and a mark per run, as in the figures of arXiv:1811.12231."""
    names = next(iter(found.values())).arrays["names"]
    figure = Figure(figsize=(6.4, 1.4 + 0.24 * len(names)), dpi=110)
    axis = figure.subplots()
    for number, (run, report) in enumerate(found.items()):
        numbers, colour, mark = report.numbers, f"C{number}", "osDv^P"[number % 6]
        keys = [f"shape_bias_{name}" for name in names]
        values = [
            numbers[key].value if key in numbers else float("nan") for key in keys
        ]
        whole = numbers["shape_bias"]
        label = f"{run} ({report.arrays['head']}): {whole.value:.2f}"
        if whole.interval:
            label += f" [{whole.interval[0]:.2f}, {whole.interval[1]:.2f}]"
            axis.axvspan(*whole.interval, color=colour, alpha=0.15, lw=0)
        axis.axvline(whole.value, color=colour, lw=1)
        axis.plot(values, range(len(names)), mark, color=colour, ms=5, label=label)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlim(-0.02, 1.02)
    axis.grid(axis="y", lw=0.4)
    axis.set_xlabel(
        "shape decisions / (shape + texture decisions), by category of shape: 0 is "
        "all texture, 1 is all shape",
        fontsize=8,
    )
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1))
    figure.tight_layout()
    return figure


def _decisions(name: str, report: Report) -> Figure | None:
    arrays, panels = report.arrays, []
    names = arrays["names"]
    for row, image in zip(arrays["chosen"], arrays["examples"], strict=True):
        shape, texture = arrays["pairs"][row]
        decided = arrays["decided"][row]
        by, colour = "", "black"
        if decided == shape:
            by, colour = " (shape)", "tab:green"
        elif decided == texture:
            by, colour = " (texture)", "tab:red"
        text = (
            f"shape of {names[shape]}\ntexture of {names[texture]}\n"
            f"says {names[decided]}{by}"
        )
        panels.append(Panel(image, title=text, colour=colour))
    if not panels:
        return None
    title = f"{name} ({arrays['head']}): decisions"
    return gallery(panels, 6, (1.6, 2.1), title)
