# SPDX-License-Identifier: Apache-2.0
"""Batches given by a test, in the form in which evaluations ask for them."""

import contextlib
import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class GivenSet:
    """An evaluation set of batches that are already there."""

    images: Any
    given: list

    def batches(self):
        return contextlib.nullcontext(self.given)


@dataclasses.dataclass(frozen=True)
class Given:
    """Passes over batches that are already there."""

    batches: list
    training: list = dataclasses.field(default_factory=list)
    classes: tuple[str, ...] = ()
    sets: dict[str, GivenSet] = dataclasses.field(default_factory=dict)
    given: dict[int, Any] = dataclasses.field(default_factory=dict)  # by index
    object_classes: tuple[str, ...] = ()

    def objects(self, split, index, shape):
        return self.given[index]

    def held_out(self, spread=False):
        del spread  # batches come as they are given
        return contextlib.nullcontext(self.batches)

    def train(self, spread=False):
        del spread
        return contextlib.nullcontext(self.training)

    def evaluation_set(self, entry):
        return self.sets[entry]

    def known(self, hidden):
        return {}

    def name_of(self, split, index):
        return f"{split}/{index}"

    def train_examples(self, indices):
        whole = {
            name: np.concatenate([batch[name] for batch in self.training])
            for name in self.training[0]
        }
        rows = [list(whole["index"]).index(index) for index in indices]
        return {name: value[rows] for name, value in whole.items()}
