# SPDX-License-Identifier: Apache-2.0
"""Few-shot accuracy of frozen features by ridge regression, in closed form."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from mim_jax.evals.base import Eval, Headline, Passes, Run
from mim_jax.evals.features import extract_splits, l2_normalised
from mim_jax.evals.report import Number, Report, mean_of
from mim_jax.objectives.base import Objective


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

    shots: tuple[int, ...] = (1, 5, 10, 25)
    draws: int = 3
    penalties: tuple[float, ...] = tuple(10.0**i for i in range(-4, 4))
    seed: int = 0

    def __post_init__(self):
        if not self.shots or min(self.shots) < 1 or self.draws < 1:
            raise ValueError(
                f"shots={self.shots}, draws={self.draws}: want numbers >= 1"
            )
        if not self.penalties or min(self.penalties) <= 0:
            raise ValueError(f"penalties={self.penalties}: want numbers > 0")

    def check_objective(self, objective: Objective) -> None:
        pass  # every objective has features

    def measure(self, run: Run, data: Passes) -> Report:
        train, held_out = extract_splits(run, run.params, data)
        classes = len(data.classes)
        sizes = np.bincount(train.labels[train.labels >= 0], minlength=max(classes, 1))
        shots = [number for number in self.shots if number <= sizes.min()]
        if not classes or not shots:
            raise ValueError(
                f"shots={self.shots}: the rarest class has {sizes.min()} training "
                "images; want at most that many, and a source with labels"
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
        axis.set_ylabel(f"accuracy, mean of {self.draws} draws")
        axis.legend(fontsize=7)
        figure.tight_layout()
        return {"ridge": figure}


def fit(
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    classes: int,
    penalties: Sequence[float],
) -> tuple[tuple[np.ndarray, np.ndarray], float]:
    """Ridge regression to class indicators, by the penalty that generalises best.

    Weights W and biases b minimise |X W + b - Y|^2 + penalty s |W|^2, where Y are the
    class indicators and s is the sum of squared lengths of centred features over n.
    Biases are not penalised. When row i is left out, its error is its residual over
    1 - h_i, where h_i is the leverage of the row.

    Args:
        penalties: to choose from.
    Returns:
        ((weights "d c", biases "c"), penalty) with the least leave-one-out error.

    Example:
        >>> features = np.array([[0.0], [0.1], [0.9], [1.0]])
        >>> (weights, biases), _ = fit(features, np.array([0, 0, 1, 1]), 2, (0.1,))
        >>> (features @ weights + biases).argmax(axis=1).tolist()
        [0, 0, 1, 1]
    """
    x, y = features.astype(np.float64), np.eye(classes)[labels]
    centre, level = x.mean(axis=0), y.mean(axis=0)
    x, centred = x - centre, y - level
    left, scale, right = np.linalg.svd(x, full_matrices=False)
    size = (scale**2).sum() / len(x) or 1.0
    best = None
    for penalty in penalties:
        shrunk = scale**2 / (scale**2 + penalty * size)
        residual = centred - left @ (shrunk[:, None] * (left.T @ centred))
        leverage = (left**2 * shrunk).sum(axis=1) + 1 / len(x)
        error = ((residual / np.maximum(1 - leverage, 1e-12)[:, None]) ** 2).mean()
        if best is None or error < best[0]:
            best = error, penalty
    assert best is not None
    weights = right.T @ (
        (scale / (scale**2 + best[1] * size))[:, None] * (left.T @ centred)
    )
    return (weights, level - centre @ weights), best[1]
