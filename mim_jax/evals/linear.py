# SPDX-License-Identifier: Apache-2.0
"""Linear probe of features that are extracted once, at many learning rates at once."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from matplotlib.figure import Figure

from mim_jax.evals.base import Eval, Headline, Passes, Run
from mim_jax.evals.features import Features, extract_splits
from mim_jax.evals.report import Number, Report, share_of
from mim_jax.objectives.base import Objective
from mim_jax.ops.lars import trusted
from mim_jax.ops.losses import cross_entropy
from mim_jax.schema import check_ranges, within


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(Eval):
    """Accuracy of a linear classifier on frozen features (`Objective.features`).

    The optimiser is that of MAE's linear probe (LARS, cosine decay, a warm-up of a
    ninth of the steps; arXiv:2111.06377, table 10). Unlike there, images are not
    augmented, and features are standardised by their mean and deviation over all
    training images. A part of the training images is held back to choose the learning
    rate; then a classifier is fitted to all of them at that rate. Features of all
    training images are held in memory, in float32.

    Attributes:
        rates: learning rates per 256 images, all fitted at the same time.
        epochs: passes over the features.
        batch_size: features per step.
        held_back: share of the training images that chooses the rate.
        momentum, trust: of LARS.
        seed: of the order, of the images held back and of the first weights.
    """

    description: ClassVar[str] = (
        "A linear classifier trained on the frozen features of all training images. "
        "The curve shows how its accuracy depends on the learning rate."
    )
    headlines: ClassVar[tuple[Headline, ...]] = (
        Headline(
            "accuracy",
            "accuracy, linear probe",
            "share",
            "higher",
            "Share of held-out images whose class a linear classifier finds from the "
            "frozen features, trained on all training labels.",
        ),
    )

    rates: tuple[float, ...] = within(
        # To 102.4.
        tuple(0.1 * 2.0**i for i in range(11)),
        above=0,
        most=1e6,
    )
    epochs: int = within(90, least=1, most=10**5)
    batch_size: int = within(256, least=1, most=2**20)
    held_back: float = within(0.1, above=0, below=1)
    momentum: float = within(0.9, least=0, below=1)
    trust: float = within(0.001, above=0, most=1e9)
    seed: int = within(0, least=0, most=2**31 - 1)

    def __post_init__(self):
        check_ranges(self)

    def check_objective(self, objective: Objective) -> None:
        pass  # every objective has features

    def check_data(self, objective: Objective, data: Passes) -> None:
        if not data.classes:
            raise ValueError(
                "a linear probe learns labels, and the source has none: want a source "
                "with classes, such as digits"
            )

    def measure(self, run: Run, data: Passes) -> Report:
        self.check_data(run.objective, data)
        train, held_out = map(_labelled, extract_splits(run, run.params, data))
        mean, deviation = train.vectors.mean(axis=0), train.vectors.std(axis=0)
        scale = 1 / np.sqrt(deviation**2 + 1e-6)

        def standard(features: Features) -> tuple[np.ndarray, np.ndarray]:
            return (features.vectors - mean) * scale, features.labels

        bank, labels = standard(train)
        count = len(labels)
        order = np.random.default_rng(self.seed).permutation(count)
        back = round(self.held_back * count)
        if not 1 <= back < count:
            raise ValueError(
                f"held_back={self.held_back} of {count} training images with a label: "
                "want at least one on both sides"
            )
        fitted, chosen = order[back:], order[:back]
        tried = self.fit(bank[fitted], labels[fitted], len(data.classes), self.rates)
        found = np.stack(
            [predict(one, bank[chosen]) == labels[chosen] for one in tried]
        ).mean(axis=1)
        # argmax takes the smallest of equally good rates: ties are common.
        rate = self.rates[int(np.argmax(found))]
        (final,) = self.fit(bank, labels, len(data.classes), (rate,))
        queries, answers = standard(held_out)
        right = predict(final, queries) == answers
        numbers = {
            "accuracy": share_of(right),
            "rate": Number(rate, "1"),
            "accuracy_held_back": Number(float(found.max()), "share", back),
            "training_images": Number(count, "images"),
        }
        arrays = {
            "rates": np.array(self.rates),
            "accuracy_held_back": found,
            "right": right,
        }
        return Report(numbers=numbers, arrays=arrays)

    def fit(
        self,
        features: Float[np.ndarray, "n d"],
        labels: Int[np.ndarray, " n"],
        classes: int,
        rates: Sequence[float],
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Train a classifier at each rate.

        Returns:
            (weights "d c", biases "c") of each rate, after all epochs.
        """
        rows = min(self.batch_size, len(labels))
        steps = len(labels) // rows  # per epoch; the rest is not read
        total = steps * self.epochs
        peak = jnp.asarray(rates, jnp.float32) * rows / 256
        base = jax.random.key(self.seed, impl="threefry2x32")
        images, targets = jnp.asarray(features), jnp.asarray(labels)

        def loss(head, x, y):
            logits = x @ head[0] + head[1][None]
            return cross_entropy(logits, jax.nn.one_hot(y, classes)).mean()

        def step(images, targets, carry, given):
            head, momentum = carry
            batch, share = given
            grads = jax.vmap(jax.grad(loss), (0, None, None))(
                head, images[batch], targets[batch]
            )
            grads = (
                jax.vmap(lambda g, w: trusted(g, w, self.trust))(grads[0], head[0]),
                grads[1],
            )
            momentum = jax.tree.map(lambda m, g: self.momentum * m + g, momentum, grads)
            head = jax.tree.map(
                lambda w, m: w - (peak * share).reshape(-1, *[1] * (w.ndim - 1)) * m,
                head,
                momentum,
            )
            return (head, momentum), None

        @jax.jit
        def epoch(images, targets, carry, number):
            key = jax.random.fold_in(base, number)
            order = jax.random.permutation(key, len(labels))[: steps * rows]
            shares = _schedule(number * steps + jnp.arange(steps), total)
            given = (order.reshape(steps, rows), shares)
            one = functools.partial(step, images, targets)
            return jax.lax.scan(one, carry, given)[0]

        weights = 0.01 * jax.random.normal(
            jax.random.fold_in(base, self.epochs), (features.shape[1], classes)
        )
        head = jax.tree.map(
            lambda x: jnp.repeat(x[None], len(rates), axis=0),
            (weights, jnp.zeros(classes)),
        )
        carry = head, jax.tree.map(jnp.zeros_like, head)
        for number in range(self.epochs):
            # Arguments: closed over, gigabytes would be compiled in as constants.
            carry = epoch(images, targets, carry, number)
        kernels, biases = map(np.asarray, carry[0])
        return list(zip(kernels, biases, strict=True))

    def draw(self, found: dict[str, Report]) -> dict[str, Figure]:
        figure = Figure(figsize=(5.2, 3.4), dpi=110)
        axis = figure.subplots()
        for name, report in found.items():
            value = report.numbers["accuracy"].value
            axis.plot(
                report.arrays["rates"],
                report.arrays["accuracy_held_back"],
                marker=".",
                label=f"{name}: {value:.1%} on held-out images",
            )
        axis.set_xscale("log")
        axis.set_xlabel("learning rate per 256 images")
        axis.set_ylabel(
            "accuracy on training images held back\n(higher is better)", fontsize=8
        )
        axis.legend(fontsize=7)
        figure.tight_layout()
        return {"linear": figure}


def predict(
    head: tuple[np.ndarray, np.ndarray], features: Float[np.ndarray, "n d"]
) -> Int[np.ndarray, " n"]:
    """Classes by a linear classifier.

    Args:
        head: weights "d c" and biases "c".

    Example:
        >>> head = np.array([[1.0, -1.0]]), np.array([0.0, 0.5])
        >>> predict(head, np.array([[2.0], [-2.0]])).tolist()
        [0, 1]
    """
    return (features @ head[0] + head[1]).argmax(axis=1)


def _schedule(step: Int[Array, " s"], total: int) -> Float[Array, " s"]:
    """Share of the peak rate: a linear rise over a ninth of the steps, then half a
    cosine."""
    warmup = total / 9
    at = step.astype(jnp.float32)
    fall = 0.5 * (
        1 + jnp.cos(jnp.pi * jnp.clip((at - warmup) / (total - warmup), 0, 1))
    )
    return jnp.where(at < warmup, at / warmup, fall)


def _labelled(features: Features) -> Features:
    """The features of images with a label."""
    known = features.labels >= 0
    if not known.any():
        raise ValueError(
            "a linear probe needs labels, and no image of the split has one: want a "
            "source with labels"
        )
    return Features(*(part[known] for part in features))
