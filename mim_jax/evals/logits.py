# SPDX-License-Identifier: Apache-2.0
"""Logits of every image of a pass, and the classes of evaluation sets."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float

from mim_jax.evals.base import Batch, Passes, Run, SetPasses
from mim_jax.evals.features import check_finite
from mim_jax.evals.images import watched
from mim_jax.objectives.base import LabelObjective, Objective


def classifier(run: Run) -> Callable[[Any], jax.Array]:
    """The function from uint8 images to a run's logits; compiled once for all passes.

    Raises:
        ValueError: the run's objective has no classes.
    """
    objective = labelled(run.objective)
    jitted = jax.jit(objective.logits)
    return lambda images: jitted(run.params, run.stats, images)


class Answers(NamedTuple):
    """What a classifier answers to one batch.

    Attributes:
        rows: the valid rows of the batch.
        logits: of each of them.
        unreadable: number of records of the batch that could not be decoded.
    """

    rows: Batch
    logits: Float[np.ndarray, "b c"]
    unreadable: int


def predict(
    classify: Callable[[Any], jax.Array], batches: Iterable[Batch]
) -> Iterator[Answers]:
    """The answers of a classifier, batch by batch, each image once."""
    for batch in watched(batches, "logits"):
        valid, index = (np.asarray(batch[name]) for name in ("valid", "index"))
        # A copy, as the next batch may be written to the same memory.
        rows = {name: np.array(value)[valid] for name, value in batch.items()}
        logits = np.asarray(classify(batch["image"]), np.float32)[valid]
        check_finite(logits, "logits")
        # Padding has no index.
        yield Answers(rows, logits, int((~valid & (index >= 0)).sum()))


def labelled(objective: Objective) -> LabelObjective:
    """The same objective, known to have classes.

    Raises:
        ValueError: it has none.
    """
    if not isinstance(objective, LabelObjective):
        raise ValueError(
            f"{type(objective).__name__} tells no classes apart; want a run that "
            "learned labels, by configs/finetune.py, configs/linear_probe.py or "
            "configs/supervised.py"
        )
    return objective


def find_set(objective: Objective, data: Passes, entry: str) -> SetPasses:
    """An evaluation set whose labels are about the classes of the objective.

    Args:
        entry: "NAME" or "NAME=FOLDER".
    Raises:
        ValueError: the set is missing, or is about other classes.
    """
    found = data.evaluation_set(entry)
    want, have = found.images.model_classes, labelled(objective).classes
    if want != have:
        raise ValueError(
            f"set {entry!r} is for models of {want} classes, and this one has {have}: "
            "want another set, or a run on data with those classes"
        )
    return found


def membership(
    members: tuple[tuple[int, ...], ...], classes: int
) -> Bool[np.ndarray, "s c"]:
    """True where a class of the model counts as a class of a set.

    Args:
        members: for each class of the set, the classes of the model that count as it.
        classes: number of classes of the model.

    Example:
        >>> membership(((0, 2), (1,)), 3).tolist()
        [[True, False, True], [False, True, False]]
    """
    table = np.zeros((len(members), classes), bool)
    for row, some in enumerate(members):
        table[row, list(some)] = True
    return table
