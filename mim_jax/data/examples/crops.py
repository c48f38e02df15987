# SPDX-License-Identifier: Apache-2.0
"""Crops of one image, with its label."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mim_jax.data.decoding import decode
from mim_jax.data.examples.base import (
    Examples,
    common_fields,
    source_values,
    with_source_fields,
)
from mim_jax.data.fields import Example, Fields, FieldSpec
from mim_jax.data.geometry import Geometry


@dataclasses.dataclass(frozen=True, kw_only=True)
class Crops(Examples):
    """Random crops of an image for training, its centre for evaluation.

    Training examples have `image` and `label`; with `data.crops=2` also `image2`, a
    second crop like the first, and with `data.local_crops` also `local`, the smaller
    crops, uint8 (l, h', w', c). Fields that the source declares come through unchanged.
    """

    def fields(self, data: Geometry) -> Fields:
        fields = common_fields(data)
        if data.crops == 2:
            fields["image2"] = fields["image"]
        if data.local_crops:
            local = (data.local_crops, *data.local_size, data.source.channels)
            fields["local"] = FieldSpec(local, np.uint8)
        return with_source_fields(fields, data)

    def eval_fields(self, data: Geometry) -> Fields:
        return with_source_fields(common_fields(data), data)

    def train(
        self, record: Mapping[str, Any], data: Geometry, rng: np.random.Generator
    ) -> Example:
        pixels = decode(record["image"], data.source.channels, data.suffices)
        shape = pixels.shape[:2]

        def crop(local: bool = False) -> np.ndarray:
            shown = data.sample_view(shape, rng, local).image(pixels)
            return data.randaugment(shown, rng)

        example = {"image": crop(), "label": np.int32(record["label"])}
        if data.crops == 2:
            example["image2"] = crop()
        if data.local_crops:
            local = [crop(local=True) for _ in range(data.local_crops)]
            example["local"] = np.stack(local)
        return example | source_values(record, data)

    def evaluate(self, record: Mapping[str, Any], data: Geometry) -> Example:
        pixels = decode(record["image"], data.source.channels)
        image = data.centre_view(pixels.shape[:2]).image(pixels)
        example = {"image": image, "label": np.int32(record["label"])}
        return example | source_values(record, data)

    def advice(self, name: str) -> str:
        settings = {
            "image2": "config.data.crops=2",
            "local": "config.data.local_crops >= 1",
        }
        return settings[name] if name in settings else ""
