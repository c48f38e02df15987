# SPDX-License-Identifier: Apache-2.0
"""Features of some classes, mapped to the plane."""

import dataclasses
from typing import ClassVar

import numpy as np
from matplotlib.figure import Figure

from mim_jax.evals.base import Eval, Headline, Passes, Run
from mim_jax.evals.features import extract
from mim_jax.evals.report import Number, Report
from mim_jax.objectives.base import Objective
from mim_jax.schema import check_ranges, within


@dataclasses.dataclass(frozen=True, kw_only=True)
class TSNE(Eval):
    """t-SNE of held-out features of some classes, figure 8 of arXiv:2306.04898.

    By scikit-learn. A t-SNE picture looks convincing whatever the features are, so two
    numbers of the features themselves stand beside it: the silhouette of the classes
    (cosine distance, -1..1), and the accuracy of a linear classifier in five-fold
    cross-validation.

    Attributes:
        classes: number of classes, chosen at random.
        images: per class at most.
        perplexity: of t-SNE.
        seed: of the choice of classes and of t-SNE.
    """

    description: ClassVar[str] = (
        "Features of held-out images, mapped to the plane so that similar ones lie "
        "close together; one colour per class. The numbers are of the features "
        "themselves, not of the map."
    )
    headlines: ClassVar[tuple[Headline, ...]] = (
        Headline(
            "linear_accuracy",
            "accuracy, linear, cross-validated",
            "share",
            "higher",
            "Share of held-out images whose class a linear classifier finds, trained "
            "on the features of the other held-out images.",
        ),
        Headline(
            "silhouette",
            "silhouette",
            "1",
            "higher",
            "How well the features separate the classes: 1 means tight and far apart, "
            "0 means overlapping, -1 means mixed up.",
        ),
    )

    classes: int = within(10, least=2, most=1000)
    images: int = within(50, least=5, most=10**5)
    perplexity: float = within(30.0, least=0.01, most=1e6)
    seed: int = within(0, least=0, most=2**31 - 1)

    def __post_init__(self):
        check_ranges(self)

    def check_objective(self, objective: Objective) -> None:
        pass  # every objective has features

    def check_data(self, objective: Objective, data: Passes) -> None:
        if len(data.classes) < self.classes:
            raise ValueError(
                f"classes={self.classes}: the source has {len(data.classes)}; want at "
                "most that many, or a source with labels"
            )

    def measure(self, run: Run, data: Passes) -> Report:
        # Slow to import: only when they are used.
        from sklearn.linear_model import LogisticRegression
        from sklearn.manifold import TSNE as SklearnTSNE
        from sklearn.metrics import silhouette_score
        from sklearn.model_selection import StratifiedKFold, cross_val_score
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        self.check_data(run.objective, data)
        with data.held_out() as batches:
            found = extract(run.objective.features, run.params, batches)
        rng = np.random.default_rng(self.seed)
        chosen = np.sort(rng.permutation(len(data.classes))[: self.classes])
        rows = np.concatenate(
            [np.flatnonzero(found.labels == label)[: self.images] for label in chosen]
        )
        vectors, labels = found.vectors[rows], found.labels[rows]
        least = min(np.sum(labels == label) for label in chosen)
        if least < 5 or len(rows) <= 3 * self.perplexity:
            raise ValueError(
                f"{len(rows)} held-out images, {least} of the rarest class, with "
                f"perplexity={self.perplexity}: want 5 of each class and more than 3 "
                "times the perplexity"
            )
        if not np.ptp(vectors, axis=0).any():
            raise ValueError(
                "the features of all images are the same, so they have no plane: the "
                "model has collapsed, or the images are all alike"
            )
        plane = SklearnTSNE(
            perplexity=self.perplexity, init="pca", random_state=self.seed
        ).fit(vectors)
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        folds = StratifiedKFold(5, shuffle=True, random_state=self.seed)
        accuracy = cross_val_score(probe, vectors, labels, cv=folds).mean()
        silhouette = silhouette_score(vectors, labels, metric="cosine")
        numbers = {
            "images": Number(len(rows), "images"),
            "silhouette": Number(float(silhouette), "1", len(rows)),
            "linear_accuracy": Number(float(accuracy), "share", len(rows)),
            "kl_divergence": Number(float(plane.kl_divergence_), "nats"),
        }
        arrays = {
            "plane": plane.embedding_,
            "labels": labels,
            "names": np.array([data.classes[label] for label in chosen]),
            "chosen": chosen,
        }
        return Report(numbers=numbers, arrays=arrays)

    def draw(self, found: dict[str, Report]) -> dict[str, Figure]:
        figure = Figure(figsize=(4.2 * len(found) + 1.2, 4.3), dpi=110)
        axes = figure.subplots(1, len(found), squeeze=False)[0]
        for axis, (name, report) in zip(axes, found.items(), strict=True):
            arrays, values = report.arrays, report.scalars
            for number, label in enumerate(arrays["chosen"]):
                points = arrays["plane"][arrays["labels"] == label]
                axis.scatter(*points.T, s=9, label=arrays["names"][number])
            axis.set_title(
                f"{name}\nsilhouette {values['silhouette']:.2f}, linear accuracy "
                f"{values['linear_accuracy']:.1%}\n(of the features; higher is better)",
                fontsize=8,
            )
            axis.set_xticks([])
            axis.set_yticks([])
        axes[-1].legend(
            title="class",
            fontsize=7,
            title_fontsize=8,
            loc="center left",
            bbox_to_anchor=(1, 0.5),
        )
        figure.tight_layout()
        return {"tsne": figure}
