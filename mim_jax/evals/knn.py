# SPDX-License-Identifier: Apache-2.0
"""Nearest neighbours of frozen features: an accuracy and a picture."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from mim_jax.evals.base import Eval, Number, Passes, Report, Run, share_of, show
from mim_jax.evals.features import Features, extract
from mim_jax.objectives.base import Objective


@dataclasses.dataclass(frozen=True, kw_only=True)
class KNN(Eval):
    """Weighted k-nearest-neighbour classification of held-out images.

    Features are those of the whole image (`Objective.features`), scaled to length 1.
    Each of the k most similar training images votes for its class with weight
    exp(similarity / temperature), as in arXiv:1805.01978 and DINO. The same for the
    parameters that the run started from. Without labels there is only the picture.

    Attributes:
        k: numbers of neighbours; those above the number of training images are left
            out.
        temperature: of the weights, > 0.
        rows: held-out images in the picture.
        neighbours: of each in the picture.
    """

    k: tuple[int, ...] = (10, 20, 100, 200)
    temperature: float = 0.07
    rows: int = 8
    neighbours: int = 7

    def __post_init__(self):
        if not self.k or min(self.k) < 1 or not self.temperature > 0:
            raise ValueError(
                f"k={self.k}, temperature={self.temperature}: want numbers >= 1 and a "
                "temperature > 0"
            )
        if min(self.rows, self.neighbours) < 1:
            raise ValueError(
                f"rows={self.rows}, neighbours={self.neighbours}: want at least 1"
            )

    def check_objective(self, objective: Objective) -> None:
        pass  # every objective has features

    def measure(self, run: Run, data: Passes) -> Report:
        spaces = {}
        for name, params in (("model", run.params), ("untrained", run.initial)):
            encode = run.objective.features
            with data.train() as batches:
                train = extract(encode, params, batches)
            with data.held_out() as batches:
                spaces[name] = train, extract(encode, params, batches)
        train, held_out = spaces["model"]
        counts = [k for k in self.k if k <= len(train.labels)]
        numbers = {
            "images": Number(len(held_out.labels), "images"),
            "training_images": Number(len(train.labels), "images"),
        }
        known = held_out.labels >= 0
        if data.classes and known.any() and counts:
            for name, (bank, queries) in spaces.items():
                found = classify(bank, queries, counts, self.temperature)
                for k, predicted in zip(counts, found, strict=True):
                    right = (predicted == queries.labels)[known]
                    numbers[f"accuracy_{name}_k{k}"] = share_of(right)
        arrays = self._gallery(data, train, held_out)
        return Report(numbers=numbers, arrays=arrays)

    def _gallery(
        self, data: Passes, train: Features, held_out: Features
    ) -> dict[str, np.ndarray]:
        rows = min(self.rows, len(held_out.labels))
        # Spread over the split, which may be sorted by class.
        chosen = np.linspace(0, len(held_out.labels) - 1, rows).round().astype(int)
        similar = _unit(held_out.vectors[chosen]) @ _unit(train.vectors).T
        columns = min(self.neighbours, len(train.labels))
        order = np.argsort(-similar, axis=1, kind="stable")[:, :columns]
        near = data.train_examples([int(i) for i in train.indices[order].ravel()])
        wanted = {int(held_out.indices[i]): row for row, i in enumerate(chosen)}
        queries = {}
        with data.held_out() as batches:
            for batch in batches:
                for i, index in enumerate(np.asarray(batch["index"])):
                    if int(index) in wanted and batch["valid"][i]:
                        queries[wanted[int(index)]] = np.array(batch["image"][i])
        images = near["image"].reshape(rows, columns, *near["image"].shape[1:])
        names = np.array([*data.classes, ""])  # -1, unknown, is the last
        return {
            "queries": np.stack([queries[row] for row in range(rows)]),
            "neighbours": images,
            "similarity": np.take_along_axis(similar, order, axis=1),
            "query_class": names[held_out.labels[chosen]],
            "neighbour_class": names[near["label"].reshape(rows, columns)],
        }

    def draw(self, found: dict[str, Report]) -> dict[str, Figure]:
        figures = {}
        for number, (name, report) in enumerate(found.items()):
            title = "knn" if len(found) == 1 else f"knn{number}"
            figures[title] = _picture(name, report)
        return figures


def classify(
    bank: Features, queries: Features, counts: list[int], temperature: float
) -> Int[np.ndarray, "k n"]:
    """Classes of the queries by weighted vote, for each number of neighbours.

    Args:
        bank: labelled features; those without a label do not vote.
        counts: numbers of neighbours, none above the size of the bank.
    """
    classes = int(bank.labels.max()) + 1
    vectors = jnp.asarray(_unit(bank.vectors))
    votes = jnp.asarray(np.eye(classes + 1, dtype=np.float32)[bank.labels][:, :classes])

    @jax.jit
    def vote(rows):
        similar, near = jax.lax.top_k(rows @ vectors.T, max(counts))
        # Relative to the nearest: exp(1 / .07) would be 1.6e6.
        weights = jnp.exp((similar - similar[:, :1]) / temperature)
        weighted = weights[..., None] * votes[near]
        totals = jnp.cumsum(weighted, axis=1)
        return jnp.stack([totals[:, k - 1].argmax(axis=-1) for k in counts])

    rows = _unit(queries.vectors)
    parts = [np.asarray(vote(rows[i : i + 256])) for i in range(0, len(rows), 256)]
    return np.concatenate(parts, axis=1)


def _unit(vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(length, 1e-12)


def _picture(name: str, report: Report) -> Figure:
    arrays = report.arrays
    rows, columns = arrays["similarity"].shape
    figure = Figure(figsize=(1.3 * (columns + 1), 1.5 * rows + 0.6), dpi=110)
    axes = figure.subplots(rows, columns + 1, squeeze=False)
    for row in range(rows):
        label = arrays["query_class"][row]
        show(axes[row, 0], arrays["queries"][row], label)
        for column in range(columns):
            other = arrays["neighbour_class"][row, column]
            text = f"{other} {arrays['similarity'][row, column]:.2f}".strip()
            wrong = label and other and label != other
            colour = "tab:red" if wrong else "black"
            show(axes[row, column + 1], arrays["neighbours"][row, column], text, colour)
    figure.suptitle(
        f"{name}: held-out image, then its nearest training images by cosine "
        "similarity",
        fontsize=8,
    )
    figure.tight_layout()
    return figure
