# SPDX-License-Identifier: Apache-2.0
"""Ordered passes over the images of a run and over evaluation sets."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from mim_jax.data.decoding import Undecodable, decode
from mim_jax.data.fields import Example, Fields, FieldSpec
from mim_jax.data.input import Input
from mim_jax.data.pipeline import (
    EVAL_ROW,
    eval_batches,
    eval_example,
    filled_row,
    positions_of_host,
)
from mim_jax.data.sets import SETS
from mim_jax.data.sets.base import EvaluationSet
from mim_jax.data.workers import Batch, Batches, read_ahead


@dataclasses.dataclass(frozen=True)
class EvalPasses:
    """Ordered passes over both splits of an input, for evaluations.

    Attributes:
        data: whose training source and held-out split are read.
        batch_size: images per batch.

    Example:
        >>> from mim_jax.data.sources.digits import Digits
        >>> data = Input(source=Digits(), image_size=(8, 8), workers=0)
        >>> passes = EvalPasses(data, batch_size=100)
        >>> with passes.held_out() as batches:
        ...     labels = [batch["label"][batch["valid"]] for batch in batches]
        >>> len(np.concatenate(labels)), len(passes.classes)
        (355, 10)
    """

    data: Input
    batch_size: int = 64

    def train(self) -> Batches:
        """One pass over the training images, without augmentation."""
        source = self.data.source
        return eval_batches(self.data, batch_size=self.batch_size, source=source)

    def held_out(self) -> Batches:
        """One pass over the held-out images."""
        return eval_batches(self.data, batch_size=self.batch_size)

    def train_examples(self, indices: Sequence[int]) -> Batch:
        """Those training records as one batch."""
        fields = self.data.examples.eval_fields(self.data)
        rows = [eval_example(self.data, fields, index) for index in indices]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def evaluation_set(self, entry: str) -> "SetPasses":
        """Images other than those of the source, by "NAME" or "NAME=FOLDER".

        Raises:
            ValueError: the name is unknown, or the set is absent or incomplete.
        """
        name, _, folder = entry.partition("=")
        if name not in SETS:
            known = ", ".join(sorted(SETS))
            raise ValueError(f"set {name!r} is unknown; known: {known}")
        images = SETS[name](name, folder, self.data.source)
        return SetPasses(self.data, images, self.batch_size)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; () if unlabelled."""
        return self.data.source.classes


@dataclasses.dataclass(frozen=True)
class SetPasses:
    """Ordered passes over an evaluation set, by the centre crop of an input.

    Attributes:
        data: gives the size and channels of the images.
        images: the set; its attributes say what its labels mean.
        batch_size: images per batch.
    """

    data: Input
    images: EvaluationSet
    batch_size: int = 64

    def batches(self) -> Batches:
        """One pass: `image`, `index`, `replaced` and `valid` as in `eval_batches`, and
        `labels` int32 (b, l), filled with -1 where an image has fewer than l."""
        positions = positions_of_host(self.batch_size, 0, 1)
        steps = range(-(-len(self.images) // self.batch_size))
        fields = EVAL_ROW | {
            "image": FieldSpec(self.data.image_shape, np.uint8),
            "labels": FieldSpec((self.images.labels,), np.int32, fill=-1),
        }
        read = functools.partial(_set_example, self.data, self.images, fields)
        return read_ahead(read, fields, positions, steps, self.data)


def _set_example(
    data: Input, images: EvaluationSet, fields: Fields, position: int
) -> Example:
    row = filled_row(fields)
    if position >= len(images):
        return row
    record = images[position]
    given = record["labels"]
    if len(given) > images.labels:
        raise ValueError(
            f"image {position} has {len(given)} labels: want at most {images.labels}"
        )
    row["labels"][: len(given)] = given
    row["index"] = np.int32(position)
    try:
        pixels = decode(record["image"], data.source.channels)
    except Undecodable:
        return row | {"replaced": np.bool_(True)}
    if border := images.border:
        pixels = pixels[border:-border, border:-border]
    image = data.centre_view(pixels.shape[:2]).image(pixels)
    return row | {"image": image, "valid": np.bool_(True)}
