# SPDX-License-Identifier: Apache-2.0
"""What a classifier says of every image of a pass, and the sets that it is asked."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float

from mim_jax.evals.base import Batch, Passes, Run, SetPasses, watched
from mim_jax.objectives.base import LabelObjective, Objective


def classifier(run: Run) -> Callable[[Any], jax.Array]:
    """Logits of uint8 images by a run's parameters; compiled once for all passes."""
    objective = labelled(run.objective)
    jitted = jax.jit(objective.logits)
    return lambda images: jitted(run.params, run.stats, images)


class Answers(NamedTuple):
    """What a classifier says of the images of one batch.

    Attributes:
        rows: of the batch, those that are images.
        logits: of each.
        unreadable: records of the batch that could not be decoded.
    """

    rows: Batch
    logits: Float[np.ndarray, "b c"]
    unreadable: int


def predict(
    classify: Callable[[Any], jax.Array], batches: Iterable[Batch]
) -> Iterator[Answers]:
    """What a classifier says of each image of a pass, once, batch by batch."""
    for batch in watched(batches, "logits"):
        valid, index = (np.asarray(batch[name]) for name in ("valid", "index"))
        # A copy: the batch may lie in memory that the next one is written to.
        rows = {name: np.array(value)[valid] for name, value in batch.items()}
        logits = np.asarray(classify(batch["image"]), np.float32)[valid]
        # Rows that fill the last batch have no index.
        yield Answers(rows, logits, int((~valid & (index >= 0)).sum()))


def labelled(objective: Objective) -> LabelObjective:
    """The objective, if it tells classes apart.

    Raises:
        ValueError: it does not.
    """
    if not isinstance(objective, LabelObjective):
        raise ValueError(
            f"{type(objective).__name__} tells no classes apart; want a run with "
            "labels, of configs/finetune.py, configs/linear_probe.py or "
            "configs/supervised.py"
        )
    return objective


def find_set(objective: Objective, data: Passes, entry: str) -> SetPasses:
    """The set of that name, if the objective has the classes that it speaks of.

    Raises:
        ValueError: it is not there, or is of other classes.
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
        members: for each class of the set, those classes of the model.
        classes: of the model.
    """
    table = np.zeros((len(members), classes), bool)
    for row, some in enumerate(members):
        table[row, list(some)] = True
    return table
