# SPDX-License-Identifier: Apache-2.0
"""Few-shot accuracy of frozen features by ridge regression, in closed form."""

import dataclasses
from typing import ClassVar

import numpy as np
from jaxtyping import Int
from matplotlib.figure import Figure

from mim_jax.evals.base import Eval, Headline, Passes, Run
from mim_jax.evals.features import extract_splits, l2_normalised
from mim_jax.evals.report import Number, Report, mean_of
from mim_jax.objectives.base import Objective
from mim_jax.ops.ridge import fit
from mim_jax.schema import check_ranges, within


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ridge(Eval):
    """Ridge regression to class indicators from a few labelled images of each class.

    As the few-shot probes of big_vision, but with a penalty that is chosen: by the
    error on each training image when it is left out, which ridge regression has in
    closed form. Features are those of the whole image (`Objective.features`), scaled
    to length 1. All is solved in float64.

    Attributes:
        shots: images per class; a number above the size of the rarest class is left
            out.
        draws: random choices of those images; results are means over them.
        penalties: to choose from, as shares of the mean squared length of a centred
            feature.
        seed: of the choices.
    """

    description: ClassVar[str] = (
        "Accuracy with few labels: a linear classifier fitted to the frozen features "
        "of a few images of each class."
    )
    headlines: ClassVar[tuple[Headline, ...]] = (
        Headline(
            "accuracy_*",
            "few-shot accuracy, {}",
            "share",
            "higher",
            "Share of held-out images whose class a linear classifier finds from the "
            "frozen features, fitted to so many labelled images of each class.",
        ),
    )

    shots: tuple[int, ...] = within((1, 5, 10, 25), least=1)
    draws: int = within(3, least=1, most=1000)
    penalties: tuple[float, ...] = within(
        tuple(10.0**i for i in range(-4, 4)), least=1e-12, most=1e12
    )
    seed: int = within(0, least=0, most=2**31 - 1)

    def __post_init__(self):
        check_ranges(self)

    def check_objective(self, objective: Objective) -> None:
        pass  # every objective has features

    def check_data(self, objective: Objective, data: Passes) -> None:
        if not data.classes:
            raise ValueError(
                "ridge regression learns labels, and the source has none: want a "
                "source with classes, such as digits"
            )

    def measure(self, run: Run, data: Passes) -> Report:
        self.check_data(run.objective, data)
        train, held_out = extract_splits(run, run.params, data)
        classes = len(data.classes)
        sizes = np.bincount(train.labels[train.labels >= 0], minlength=classes)
        shots = [number for number in self.shots if number <= sizes.min()]
        if not shots:
            raise ValueError(
                f"shots={self.shots}: the rarest class has {sizes.min()} training "
                "images; want at most that many"
            )
        bank, queries = (
            l2_normalised(features.vectors.astype(np.float64))
            for features in (train, held_out)
        )
        known = held_out.labels >= 0
        if not known.any():
            raise ValueError(
                "ridge regression is scored on labels, and no held-out image has one: "
                "want a source with labels"
            )
        numbers = {"images": Number(int(known.sum()), "images")}
        for number in shots:
            accuracy, penalties = [], []
            for draw in range(self.draws):
                rows = self._chosen(train.labels, classes, number, draw)
                head, penalty = fit(
                    bank[rows], train.labels[rows], classes, self.penalties
                )
                found = (queries[known] @ head[0] + head[1]).argmax(axis=1)
                accuracy.append((found == held_out.labels[known]).mean())
                penalties.append(penalty)
            numbers[f"accuracy_{number}_shot"] = mean_of(accuracy, "share")
            numbers[f"penalty_{number}_shot"] = Number(
                float(np.median(penalties)), "1", self.draws
            )
        values = [numbers[f"accuracy_{number}_shot"].value for number in shots]
        arrays = {"shots": np.array(shots), "accuracy": np.array(values)}
        return Report(numbers=numbers, arrays=arrays)

    def _chosen(
        self, labels: Int[np.ndarray, " n"], classes: int, number: int, draw: int
    ) -> Int[np.ndarray, " m"]:
        """Rows of `number` random images of each class. With the same draw, the rows
        of fewer shots are among those of more."""
        order = np.random.default_rng([self.seed, draw]).permutation(len(labels))
        return np.concatenate(
            [order[labels[order] == one][:number] for one in range(classes)]
        )

    def draw(self, found: dict[str, Report]) -> dict[str, Figure]:
        figure = Figure(figsize=(4.8, 3.4), dpi=110)
        axis = figure.subplots()
        shots = next(iter(found.values())).arrays["shots"]
        for name, report in found.items():
            axis.plot(shots, report.arrays["accuracy"], marker="o", label=name)
        axis.set_xscale("log")
        axis.set_xticks(shots, [str(number) for number in shots])
        axis.minorticks_off()
        axis.set_xlabel("labelled images per class")
        axis.set_ylabel(
            f"accuracy, mean of {self.draws} draws\n(higher is better)", fontsize=8
        )
        axis.legend(fontsize=7)
        figure.tight_layout()
        return {"ridge": figure}
