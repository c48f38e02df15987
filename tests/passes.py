# SPDX-License-Identifier: Apache-2.0
"""Batches given by a test, in the form in which evaluations ask for them."""

import contextlib
import dataclasses


@dataclasses.dataclass(frozen=True)
class Given:
    """Passes over batches that are already there."""

    batches: list
    training: list = dataclasses.field(default_factory=list)
    classes: tuple[str, ...] = ()

    def held_out(self):
        return contextlib.nullcontext(self.batches)

    def train(self):
        return contextlib.nullcontext(self.training)
