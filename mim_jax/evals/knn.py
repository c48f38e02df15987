# SPDX-License-Identifier: Apache-2.0
"""Nearest neighbours of frozen features: an accuracy and a picture."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from mim_jax.evals.base import Eval, Passes, Report, Run
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

    def check(self, objective: Objective) -> None:
        pass  # every objective has features

    def measure(self, run: Run, data: Passes) -> Report:
        spaces = {}
        for name, params in (("model", run.params), ("untrained", run.initial)):
            encode = functools.partial(run.objective.features, params)
            with data.train() as batches:
                train = extract(encode, batches)
            with data.held_out() as batches:
                spaces[name] = train, extract(encode, batches)
        train, held_out = spaces["model"]
        counts = [k for k in self.k if k <= len(train.labels)]
        scalars: dict[str, float | int] = {
            "images": len(held_out.labels),
            "training_images": len(train.labels),
        }
        arrays = {}
        known = held_out.labels >= 0
        if data.classes and known.any() and counts:
            for name, (bank, queries) in spaces.items():
                found = classify(bank, queries, counts, self.temperature)
                for k, predicted in zip(counts, found, strict=True):
                    right = (predicted == queries.labels)[known]
                    key = f"accuracy_{name}_k{k}"
                    scalars[key] = float(right.mean())
                    arrays[key] = right
        figure = self._picture(run, data, train, held_out)
        return Report(scalars=scalars, pictures={"knn": figure}, arrays=arrays)

    def _picture(
        self, run: Run, data: Passes, train: Features, held_out: Features
    ) -> Figure:
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
        figure = Figure(figsize=(1.3 * (columns + 1), 1.5 * rows + 0.6), dpi=110)
        axes = figure.subplots(rows, columns + 1, squeeze=False)
        for row in range(rows):
            label = int(held_out.labels[chosen[row]])
            _show(axes[row, 0], queries[row], _named(label, data.classes))
            for column in range(columns):
                place = row * columns + column
                other = int(near["label"][place])
                score = similar[row, order[row, column]]
                caption = f"{_named(other, data.classes)} {score:.2f}".strip()
                wrong = min(label, other) >= 0 and label != other
                colour = "tab:red" if wrong else "black"
                _show(axes[row, column + 1], near["image"][place], caption, colour)
        figure.suptitle(
            f"{run.name}, step {run.step}: held-out image, then its nearest training "
            "images by cosine similarity",
            fontsize=8,
        )
        figure.tight_layout()
        return figure


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


def _named(label: int, classes: tuple[str, ...]) -> str:
    return classes[label] if 0 <= label < len(classes) else ""


def _show(axis, image: np.ndarray, caption: str, colour: str = "black") -> None:
    image = image[..., 0] if image.shape[-1] == 1 else image
    axis.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(caption, fontsize=8, color=colour)
