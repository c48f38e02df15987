# SPDX-License-Identifier: Apache-2.0
"""Learning from labels with the whole network: from scratch, or fine-tuning."""

import dataclasses
from typing import Literal

import jax
from jaxtyping import Array, Float, Key, UInt8

from mim_jax.models.heads import Classifier
from mim_jax.models.vit import SIZES, Encoder
from mim_jax.objectives.base import (
    Aux,
    Batch,
    LabelObjective,
    Params,
    Stats,
    apply,
    label_loss,
    purpose,
)
from mim_jax.ops.augment import ColorJitter
from mim_jax.ops.losses import soft_labels
from mim_jax.ops.mix import Erasing, Mix
from mim_jax.ops.patches import to_float
from mim_jax.schema import check_ranges, within


@dataclasses.dataclass(frozen=True, kw_only=True)
class Supervised(LabelObjective):
    """Cross-entropy of a linear head on the mean patch token or the class token.

    The network's defaults are those of fine-tuning in arXiv:2111.06377: the mean of the
    patch tokens, a new norm after it, learned positions. Images are jittered, erased
    and mixed, in this order; each is off by default.

    Attributes:
        encoder: the network that is learned.
        classes: number of classes; labels are 0 to classes - 1.
        pool: which tokens the linear head reads.
        smoothing: label smoothing: the true class gets 1 - smoothing (1 - 1 / classes).
        color_jitter: "whole" jitters the colours of each image.
        jitter: strength of the jitter.
        erasing: boxes of noise in place of pixels.
        mix: mixup and cutmix; if one is on, an image's loss depends on another image.
        mean, std: of the data, per channel, for pixels in 0..1.
    """

    reads = ("image", "label")

    encoder: Encoder = Encoder(**SIZES["B"], positions="learned", norm="pooled")
    classes: int = within(1000, least=2, most=2**20)
    pool: Literal["avg", "cls"] = "avg"
    smoothing: float = within(0.1, least=0, below=1)
    color_jitter: Literal["none", "whole"] = "none"
    jitter: ColorJitter = ColorJitter()
    erasing: Erasing = Erasing()
    mix: Mix = Mix()
    mean: tuple[float, ...] = within((0.485, 0.456, 0.406), least=0, most=1)
    std: tuple[float, ...] = within((0.229, 0.224, 0.225), least=1e-3, most=10)

    def __post_init__(self):
        check_ranges(self)

    @property
    def batch_coupled(self) -> bool:
        return self.mix.on

    @property
    def feature(self) -> Literal["cls", "avg"]:
        return self.pool

    def check_shape(self, image_shape: tuple[int, int, int]) -> None:
        self.check_encoder(image_shape)
        if self.color_jitter != "none":
            self.jitter.check_channels(image_shape[2])

    def init(self, key: Key[Array, ""], batch: Batch) -> tuple[Params, Stats]:
        encoder_key, head_key = jax.random.split(key)
        tokens, encoder = self.init_encoder(encoder_key, batch)
        head = self._head.init(head_key, tokens[:, 0])
        return {"encoder": encoder, "head": head["params"]}, {}

    def loss(
        self, params: Params, state, batch: Batch, keys: Key[Array, " b"]
    ) -> tuple[Float[Array, ""], Aux]:
        images = to_float(batch["image"])
        if self.color_jitter != "none":
            images = self.jitter(images, purpose(keys, 1))
        if self.erasing.p > 0:
            images = self.erasing(images, purpose(keys, 2), self.mean, self.std)
        targets = soft_labels(batch["label"], self.classes, self.smoothing)
        if self.mix.on:
            images, targets = self.mix(images, targets, purpose(keys, 3))
        logits = self.scores(params, images, purpose(keys, 4))
        return label_loss(logits, targets, stats={})

    def scores(
        self,
        params: Params,
        images: Float[Array, "b h w c"],
        keys: Key[Array, " b"] | None = None,
    ) -> Float[Array, "b {self.classes}"]:
        """Logits for images in 0..1; with `keys` the encoder drops paths."""
        return apply(self._head, params["head"], self.features(params, images, keys))

    def logits(
        self,
        params: Params,
        stats: Stats,
        images: UInt8[Array, "b h w c"] | Float[Array, "b h w c"],
    ) -> Float[Array, "b {self.classes}"]:
        del stats
        return self.scores(params, to_float(images))

    @property
    def _head(self) -> Classifier:
        return Classifier(classes=self.classes, dtype=self.encoder.dtype)

    def teacher(self, old: Params | None, params: Params, step: Array) -> None:
        return None

    def flops(self, image_shape: tuple[int, int, int]) -> float:
        size = self.grid(image_shape).size
        head = 2 * self.encoder.width * self.classes
        return 3 * (self.encoder.flops(size, image_shape[2]) + head)
