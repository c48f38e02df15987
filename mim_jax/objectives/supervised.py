# SPDX-License-Identifier: Apache-2.0
"""Supervised training from scratch, the baseline with labels."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from mim_jax.models.heads import Classifier
from mim_jax.models.vit import SIZES, Encoder
from mim_jax.objectives.base import (
    Aux,
    Batch,
    Objective,
    Params,
    Stats,
    apply,
    purpose,
)
from mim_jax.ops import augment
from mim_jax.ops.augment import ColorJitter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Supervised(Objective):
    """Cross-entropy to labels, from the mean patch token or the class token.

    Attributes:
        encoder: the network that is learned.
        classes: number of classes; labels are 0 to classes - 1.
        pool: which tokens the linear head reads.
        smoothing: label smoothing: the true class gets 1 - smoothing (1 - 1 / classes).
        color_jitter: "whole" jitters the colours of each image.
        jitter: how much.
        mean, std: of the data, per channel, for pixels in 0..1.
    """

    reads = ("image", "label")

    encoder: Encoder = Encoder(**SIZES["B"])
    classes: int = 1000
    pool: Literal["avg", "cls"] = "avg"
    smoothing: float = 0.1
    color_jitter: Literal["none", "whole"] = "none"
    jitter: ColorJitter = ColorJitter()
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self):
        if self.classes < 2 or not 0 <= self.smoothing < 1:
            raise ValueError(
                f"classes={self.classes}, smoothing={self.smoothing}: want at least 2 "
                "classes and 0 <= smoothing < 1"
            )

    @property
    def feature(self) -> Literal["cls", "avg"]:
        return self.pool

    def check(self, image_shape: tuple[int, int, int]) -> None:
        self.check_images(image_shape)
        if self.color_jitter != "none":
            self.jitter.check(image_shape[2])

    def init(self, key: Key[Array, ""], batch: Batch) -> tuple[Params, Stats]:
        patches, grid = self.patches(augment.to_float(batch["image"][:1]))
        encoder_key, head_key = jax.random.split(key)
        (tokens, _), encoder = self.encoder.init_with_output(encoder_key, patches, grid)
        head = self._head.init(head_key, tokens[:, 0])
        return {"encoder": encoder["params"], "head": head["params"]}, {}

    def loss(
        self, params: Params, state, batch: Batch, keys: Key[Array, " b"]
    ) -> tuple[Float[Array, ""], Aux]:
        images = augment.to_float(batch["image"])
        if self.color_jitter != "none":
            images = self.jitter(images, purpose(keys, 1))
        logits = self.logits(params, images)
        label = batch["label"]
        # An unknown label has no loss.
        weights = ((label >= 0) & (label < self.classes)).astype(logits.dtype)
        wanted = jax.nn.one_hot(label, self.classes, dtype=logits.dtype)
        wanted = wanted * (1 - self.smoothing) + self.smoothing / self.classes
        errors = -(wanted * jax.nn.log_softmax(logits, axis=-1)).sum(axis=-1)
        right = (logits.argmax(axis=-1) == label).astype(logits.dtype)
        weight = weights.sum()

        def mean(values):
            return (weights * values).sum() / jnp.maximum(weight, 1)

        metrics = {"accuracy": mean(right)}
        return mean(errors), Aux(weight=weight, stats={}, metrics=metrics)

    def logits(
        self, params: Params, images: Float[Array, "b h w c"]
    ) -> Float[Array, "b {self.classes}"]:
        """Of each class, for images in 0..1."""
        return apply(self._head, params["head"], self.features(params, images))

    @property
    def _head(self) -> Classifier:
        return Classifier(classes=self.classes, dtype=self.encoder.dtype)

    def teacher(self, old: Params | None, params: Params, step: Array) -> None:
        return None

    def flops(self, image_shape: tuple[int, int, int]) -> float:
        size = self.grid(image_shape).size
        head = 2 * self.encoder.width * self.classes
        return 3 * (self.encoder.flops(size, image_shape[2]) + head)
