# SPDX-License-Identifier: Apache-2.0
"""Nearest neighbours of frozen features: an accuracy and a picture."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from matplotlib.figure import Figure

from mim_jax.evals.base import Eval, Headline, Passes, Run
from mim_jax.evals.features import Features, extract_splits, l2_normalised
from mim_jax.evals.figures import Panel, gallery, one_per_run
from mim_jax.evals.report import Number, Report, share_of
from mim_jax.objectives.base import Objective
from mim_jax.schema import check_ranges, within


@dataclasses.dataclass(frozen=True, kw_only=True)
class KNN(Eval):
    """Weighted k-nearest-neighbour classification of held-out images.

    Features are those of the whole image (`Objective.features`), scaled to length 1.
    Each of the k most similar training images votes for its class with weight
    exp(similarity / temperature), as in arXiv:1805.01978 and DINO. The numbers are
    given for the trained parameters ("model") and for those before training
    ("untrained"), which costs as much again. Without labels there is only the picture.

    Attributes:
        k: numbers of neighbours; those above the number of training images are left
            out.
        temperature: of the weights, > 0.
        rows: held-out images in the picture.
        neighbours: training images beside each of them.
        untrained: measure the parameters before training, too.
    """

    description: ClassVar[str] = (
        "Held-out images, and beside each the training images whose features are most "
        "similar to its own. A neighbour of another class is marked by × and red."
    )
    headlines: ClassVar[tuple[Headline, ...]] = (
        Headline(
            "accuracy_model_k*",
            "accuracy, {} nearest neighbours",
            "share",
            "higher",
            "Share of held-out images whose class is found by a vote of the training "
            "images with the most similar features. Nothing is trained for it.",
        ),
    )

    k: tuple[int, ...] = within((10, 20, 100, 200), least=1)
    temperature: float = within(0.07, least=1e-6, most=1e6)
    rows: int = within(10, least=1, most=1000)
    neighbours: int = within(7, least=1, most=1000)
    untrained: bool = True

    def __post_init__(self):
        check_ranges(self)

    def check_objective(self, objective: Objective) -> None:
        pass  # every objective has features

    def measure(self, run: Run, data: Passes) -> Report:
        spaces = {"model": extract_splits(run, run.params, data)}
        if self.untrained:
            spaces["untrained"] = extract_splits(run, run.initial, data)
        train, held_out = spaces["model"]
        counts = [k for k in self.k if k <= len(train.labels)]
        numbers = {
            "images": Number(len(held_out.labels), "images"),
            "training_images": Number(len(train.labels), "images"),
        }
        known = held_out.labels >= 0
        labelled = known.any() and (train.labels >= 0).any()
        if data.classes and labelled and counts:
            for name, (bank, queries) in spaces.items():
                found = classify(bank, queries, counts, self.temperature)
                for k, predicted in zip(counts, found, strict=True):
                    right = (predicted == queries.labels)[known]
                    numbers[f"accuracy_{name}_k{k}"] = share_of(right)
        arrays = self._neighbours(data, train, held_out)
        return Report(numbers=numbers, arrays=arrays)

    def _neighbours(
        self, data: Passes, train: Features, held_out: Features
    ) -> dict[str, np.ndarray]:
        """Some held-out images and their nearest training images, with classes."""
        rows = min(self.rows, len(held_out.labels))
        # Spread over the split: it may be sorted by class.
        chosen = np.linspace(0, len(held_out.labels) - 1, rows).round().astype(int)
        queries = l2_normalised(held_out.vectors[chosen])
        similar = queries @ l2_normalised(train.vectors).T
        columns = min(self.neighbours, len(train.labels))
        order = np.argsort(-similar, axis=1, kind="stable")[:, :columns]
        near = data.train_examples([int(i) for i in train.indices[order].ravel()])
        images = near["image"].reshape(rows, columns, *near["image"].shape[1:])
        names = np.array([*data.classes, ""])  # -1, unknown, is the last
        return {
            "queries": _images(data, held_out.indices[chosen]),
            "neighbours": images,
            "similarity": np.take_along_axis(similar, order, axis=1),
            "query_class": names[held_out.labels[chosen]],
            "neighbour_class": names[near["label"].reshape(rows, columns)],
        }

    def sentence(self, report: Report) -> str:
        values = report.scalars
        counts = [k for k in self.k if f"accuracy_model_k{k}" in values]
        if not counts:
            return ""
        found = values[f"accuracy_model_k{counts[0]}"]
        said = f"{counts[0]} nearest neighbours find {found:.1%} of the classes"
        if self.untrained:
            before = values[f"accuracy_untrained_k{counts[0]}"]
            said += f" (untrained {before:.1%})"
        return said

    def draw(self, found: dict[str, Report]) -> dict[str, Figure]:
        return one_per_run("knn", found, _picture)


def classify(
    bank: Features, queries: Features, counts: list[int], temperature: float
) -> Int[np.ndarray, "k n"]:
    """Classes of the queries by weighted vote, one row per number of neighbours.

    Args:
        bank: features that vote; those without a label have no vote.
        counts: numbers of neighbours, none above the size of the bank.
        temperature: of the weights exp(similarity / temperature).

    Example:
        >>> def features(vectors, labels):
        ...     labels = np.array(labels, np.int32)
        ...     return Features(np.array(vectors, np.float32), labels, labels)
        >>> bank = features([[1, 0], [0, 1]], [3, 5])
        >>> classify(bank, features([[0.9, 0.1]], [-1]), [1], 0.07).tolist()
        [[3]]
    """
    classes = int(bank.labels.max()) + 1
    vectors = jnp.asarray(l2_normalised(bank.vectors))
    labels = jnp.asarray(bank.labels)
    rows, winners = l2_normalised(queries.vectors), []
    for start in range(0, len(rows), 256):
        some = rows[start : start + 256]
        found = _vote(some, vectors, labels, classes, tuple(counts), temperature)
        winners.append(np.asarray(found))
    return np.concatenate(winners, axis=1)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _vote(
    rows: Float[Array, "r d"],
    vectors: Float[Array, "n d"],
    labels: Int[Array, " n"],
    classes: int,
    counts: tuple[int, ...],
    temperature: float,
) -> Int[Array, "k r"]:
    # TPUs and GPUs would round the vectors first. Features that hardly differ between
    # images would lose what they differ in.
    products = jnp.matmul(rows, vectors.T, precision="highest")
    similar, near = jax.lax.top_k(products, max(counts))
    # Relative to the nearest, as exp(1 / .07) is 1.6e6.
    weights = jnp.exp((similar - similar[:, :1]) / temperature)
    ballots = jax.nn.one_hot(labels[near], classes)  # all zero where the label is -1
    totals = jnp.cumsum(weights[..., None] * ballots, axis=1)
    return jnp.stack([totals[:, k - 1].argmax(axis=-1) for k in counts])


def _images(data: Passes, indices: Int[np.ndarray, " r"]) -> np.ndarray:
    """The held-out images with these values of "index", in this order."""
    found = {}
    with data.held_out() as batches:
        for batch in batches:
            rows = np.isin(batch["index"], indices) & batch["valid"]
            for row in np.flatnonzero(rows):
                found[int(batch["index"][row])] = np.array(batch["image"][row])
    return np.stack([found[int(index)] for index in indices])


def _picture(name: str, report: Report) -> Figure:
    arrays, panels = report.arrays, []
    for row, label in enumerate(arrays["query_class"]):
        panels.append(Panel(arrays["queries"][row], title=label))
        for image, similarity, other in zip(
            arrays["neighbours"][row],
            arrays["similarity"][row],
            arrays["neighbour_class"][row],
            strict=True,
        ):
            text = f"{other} {similarity:.3f}".strip()
            wrong = label and other and label != other
            # Also without colour.
            text, colour = (f"× {text}", "tab:red") if wrong else (text, "black")
            panels.append(Panel(image, title=text, colour=colour))
    title = (
        f"{name}: held-out image, then the training images whose features are nearest\n"
        "Above each: class and cosine similarity (1: the same direction)"
    )
    if any(arrays["query_class"]):
        title += "; × in red: another class than the held-out image's"
    return gallery(panels, 1 + arrays["similarity"].shape[1], (1.3, 1.5), title)
