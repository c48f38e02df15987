# SPDX-License-Identifier: Apache-2.0
"""Ordered passes over the images of a run and over evaluation sets."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool

from mim_jax.data.decoding import Undecodable, decode
from mim_jax.data.fields import Example, Fields, FieldSpec
from mim_jax.data.input import Input
from mim_jax.data.pipeline import (
    EVAL_ROW,
    candidates,
    eval_batches,
    eval_example,
    filled_row,
    interleaved,
    positions_of_host,
)
from mim_jax.data.segments import Objects, objects_of
from mim_jax.data.sets import SETS
from mim_jax.data.sets.base import EvaluationSet
from mim_jax.data.sources.base import Source
from mim_jax.data.workers import Batch, Batches, read_ahead

_MOST_ROWS, _MOST_PIXELS = 64, 8 * 1024**2


@dataclasses.dataclass(frozen=True)
class EvalPasses:
    """Ordered passes over both splits of an input, for evaluations.

    Attributes:
        data: whose training source and held-out split are read.
        batch_size: images per batch; None: 64, or as many as have the pixels of eight
            images of 1024 x 1024. The detector of configs/detect.py finds objects in
            eight such images with 4.2 GiB (docs/performance.md), and would need more
            than a chip has for 64.

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
    batch_size: int | None = None

    @property
    def rows(self) -> int:
        """Images per batch."""
        if self.batch_size is not None:
            return self.batch_size
        height, width = self.data.image_size
        return max(1, min(_MOST_ROWS, _MOST_PIXELS // (height * width)))

    def train(self, spread: bool = False) -> Batches:
        """One pass over the training images, without augmentation; `spread` is as for
        `eval_batches`."""
        rows, source = self.rows, self.data.source
        return eval_batches(self.data, batch_size=rows, source=source, spread=spread)

    def held_out(self, spread: bool = False) -> Batches:
        """One pass over the held-out images; `spread` is as for `eval_batches`."""
        return eval_batches(self.data, batch_size=self.rows, spread=spread)

    def train_examples(self, indices: Sequence[int]) -> Batch:
        """Those training records as one batch."""
        fields = self.data.examples.eval_fields(self.data)
        rows = [eval_example(self.data, fields, index) for index in indices]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def some_held_out(self, count: int) -> Batch:
        """That many held-out records at most, as one batch, in the order of classes.

        All classes alike, if the source knows its labels without a read of every
        record; else from places that are evenly spaced.

        Example:
            >>> from mim_jax.data.sources.digits import Digits
            >>> data = Input(source=Digits(), image_size=(8, 8), workers=0)
            >>> EvalPasses(data).some_held_out(10)["label"].tolist()
            [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
        """
        source = self._held_out
        known = type(source).labels is not Source.labels
        labels = source.labels() if known else np.full(len(source), -1)
        if len(np.unique(labels)) > 1:
            chosen = interleaved(labels)[:count]
            chosen = chosen[np.lexsort((chosen, labels[chosen]))]
        else:
            last = len(source) - 1
            chosen = np.unique(np.linspace(0, last, count).round().astype(int))
        data = dataclasses.replace(self.data, source=source)
        fields = data.examples.eval_fields(data)
        rows = [eval_example(data, fields, int(index)) for index in chosen]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def evaluation_set(self, entry: str) -> "SetPasses":
        """Images other than those of the source, by "NAME" or "NAME=FOLDER".

        Raises:
            ValueError: the name is unknown, or the set is absent, incomplete or
                unreadable.
        """
        name, _, folder = entry.partition("=")
        if name not in SETS:
            known = ", ".join(sorted(SETS))
            raise ValueError(f"set {name!r} is unknown; known: {known}")
        images = SETS[name](name, folder, self.data.source)
        found = SetPasses(self.data, images, self.rows)
        found.check(entry)
        return found

    def known(self, hidden: Bool[np.ndarray, "b n"]) -> dict[str, float]:
        """What the source knows of predicting hidden patches of the first b held-out
        images, as `Source.known` says."""
        return self.data.source.held_out().known(hidden)

    def name_of(self, split: Literal["train", "held_out"], index: int) -> str:
        """What messages call a record of a split, such as the path of its file."""
        source = self.data.source
        return (source if split == "train" else source.held_out()).name_of(index)

    def objects(
        self,
        split: Literal["train", "held_out"],
        index: int,
        shape: tuple[int, int],
    ) -> Objects:
        """The objects of a record whose image has so many rows and columns.

        Raises:
            ValueError: the record says nothing of objects.
        """
        source = self.data.source if split == "train" else self._held_out
        return objects_of(source[index], shape)

    @functools.cached_property
    def _held_out(self) -> Source:
        return self.data.source.held_out()

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; () if unlabelled."""
        return self.data.source.classes

    @property
    def object_classes(self) -> tuple[str, ...]:
        """Names of the classes of objects; () if there are no objects."""
        return self.data.source.object_classes


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
    batch_size: int

    def batches(self) -> Batches:
        """One pass: `image`, `index`, `replaced` and `valid` as in `eval_batches`, and
        `labels` int32 (b, l), filled with -1 where an image has fewer than l."""
        positions = positions_of_host(self.batch_size, 0, 1)
        steps = range(-(-len(self.images) // self.batch_size))
        read = functools.partial(_set_example, self.data, self.images, self._fields)
        return read_ahead(read, self._fields, positions, steps, self.data)

    def check(self, entry: str) -> None:
        """ValueError, naming the set as `entry`, if none of some images can be read."""
        tried = list(candidates(0, len(self.images)))
        rows = (_set_example(self.data, self.images, self._fields, i) for i in tried)
        if not any(row["valid"] for row in rows):
            raise ValueError(
                f"set {entry!r}: none of {len(tried)} images that were tried can be "
                "read: want sound images there"
            )

    @property
    def _fields(self) -> Fields:
        return EVAL_ROW | {
            "image": FieldSpec(self.data.image_shape, np.uint8),
            "labels": FieldSpec((self.images.labels,), np.int32, fill=-1),
        }


def _set_example(
    data: Input, images: EvaluationSet, fields: Fields, position: int
) -> Example:
    row = filled_row(fields)
    if position >= len(images):
        return row
    row["index"] = np.int32(position)
    try:
        record = images[position]
        given = record["labels"]
        if len(given) > images.labels:
            raise ValueError(
                f"image {position} has {len(given)} labels: want at most "
                f"{images.labels}"
            )
        row["labels"][: len(given)] = given
        pixels = decode(record["image"], data.source.channels)
        if border := images.border:
            pixels = pixels[border:-border, border:-border]
        if not pixels.size:
            raise Undecodable(f"nothing but a border of {border} pixels")
    except (Undecodable, OSError):
        return row | {"replaced": np.bool_(True)}
    image = data.centre_view(pixels.shape[:2]).image(pixels)
    return row | {"image": image, "valid": np.bool_(True)}
