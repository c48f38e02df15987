# SPDX-License-Identifier: Apache-2.0
"""What turns a record of a source into an example for training or evaluation."""

import abc
from collections.abc import Mapping
from typing import Any

import numpy as np

from mim_jax.data.fields import LABEL, Example, Fields, FieldSpec, check_declared
from mim_jax.data.geometry import Geometry

RESERVED = ("index", "replaced", "valid")  # every batch has these from the pipeline


class Examples(abc.ABC):
    """A way to make examples. A concrete one is a final frozen dataclass.

    Its fields are its config. An example is a dict of arrays. `fields` and
    `eval_fields` declare their names, shapes and types, and the pipeline refuses an
    example that differs.

    Every example has `image`, uint8 of `data.image_shape`, and `label`, int32, -1 if
    unknown: the trainer and the evaluations read both. The names `index`, `replaced`
    and `valid` are the pipeline's own.
    """

    @abc.abstractmethod
    def fields(self, data: Geometry) -> Fields:
        """What a training example has, by name.

        Raises:
            ValueError: examples cannot be made of this source; the message says why.
        """

    @abc.abstractmethod
    def eval_fields(self, data: Geometry) -> Fields:
        """What an example for evaluation has, by name.

        Raises:
            ValueError: as `fields`.
        """

    @abc.abstractmethod
    def train(
        self, record: Mapping[str, Any], data: Geometry, rng: np.random.Generator
    ) -> Example:
        """A training example: exactly the arrays that `fields` declares.

        Args:
            record: what `data.source` yields.
            data: sizes and crops.
            rng: the only source of randomness, so that example i of a run is a pure
                function of the seed and i.
        Raises:
            Undecodable: the record is broken; the pipeline takes another one.
        """

    @abc.abstractmethod
    def evaluate(self, record: Mapping[str, Any], data: Geometry) -> Example:
        """An example for evaluation: exactly the arrays that `eval_fields` declares.

        Raises:
            Undecodable: the record is broken; its row is filled and marked not valid.
        """

    def advice(self, name: str) -> str:
        """What to set so that examples have a field of this name, such as
        "config.data.crops=2"; "" if no setting of this class gives it."""
        del name
        return ""


def common_fields(data: Geometry) -> Fields:
    """The fields that every example has."""
    return {"image": FieldSpec(data.image_shape, np.uint8), "label": LABEL}


def with_source_fields(fields: Fields, data: Geometry) -> Fields:
    """A plug-in's own fields and those that the source declares.

    Raises:
        ValueError: both have a field of the same name.
    """
    declared = data.source.fields()
    check_declared(declared, f"{type(data.source).__name__}.fields")
    if both := fields.keys() & declared.keys():
        raise ValueError(
            f"source {type(data.source).__name__} declares the fields {sorted(both)}, "
            "which examples have already; want other names"
        )
    return fields | declared


def source_values(record: Mapping[str, Any], data: Geometry) -> Example:
    """The fields that the source declares, unchanged from its record."""
    return {name: record[name] for name in data.source.fields() if name in record}
