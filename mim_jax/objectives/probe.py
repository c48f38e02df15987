# SPDX-License-Identifier: Apache-2.0
"""Linear probing: a linear classifier on the features of a frozen encoder."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8

from mim_jax.models.heads import Classifier
from mim_jax.models.vit import SIZES, Encoder
from mim_jax.objectives.base import (
    Aux,
    Batch,
    LabelObjective,
    Objective,
    Params,
    Stats,
    apply,
    label_loss,
)
from mim_jax.ops.attention import accurate
from mim_jax.ops.losses import soft_labels
from mim_jax.schema import check_ranges, within

_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe(LabelObjective):
    """MAE's linear probe, arXiv:2111.06377, appendix A.1.

    Features go through a batch norm without scale and bias, then a linear layer. In
    training the norm uses the statistics of the global batch; evaluation uses running
    statistics, whose variance has divisor n - 1.

    Attributes:
        encoder: the frozen network. If `config.init_from` names a run, its sizes,
            positions and norm are those of that run.
        classes: number of classes; labels are 0 to classes - 1.
        pool: feature of an image: class token or mean of patch tokens. If
            `config.init_from` names a run, that run's `feature`.
        momentum: weight of a new batch in the running statistics.
        deviation: of the normal distribution that initialises the linear layer.
        mean, std: of the data, per channel, for pixels in 0..1.
    """

    reads = ("image", "label")

    encoder: Encoder = Encoder(**SIZES["B"])
    classes: int = within(1000, least=2, most=2**20)
    pool: Literal["cls", "avg"] = "cls"
    momentum: float = within(0.1, above=0, most=1)
    deviation: float = within(0.01, above=0, most=100)
    mean: tuple[float, ...] = within((0.485, 0.456, 0.406), least=0, most=1)
    std: tuple[float, ...] = within((0.229, 0.224, 0.225), least=1e-3, most=10)

    def __post_init__(self):
        check_ranges(self)

    @property
    def batch_coupled(self) -> bool:
        return True  # the batch norm couples examples

    @property
    def frozen(self) -> tuple[str, ...]:
        return ("encoder",)

    @property
    def feature(self) -> Literal["cls", "avg"]:
        return self.pool

    def adopt(self, other: Objective) -> "Probe":
        """As `Objective.adopt`; also takes positions, norm and `feature` of the other
        run."""
        adopted = super().adopt(other)
        encoder = dataclasses.replace(
            adopted.encoder,
            positions=other.encoder.positions,
            norm=other.encoder.norm,
        )
        return dataclasses.replace(
            self,
            encoder=encoder,
            mean=adopted.mean,
            std=adopted.std,
            pool=other.feature,
        )

    def check_shape(self, image_shape: tuple[int, int, int]) -> None:
        self.check_encoder(image_shape)

    def init(self, key: Key[Array, ""], batch: Batch) -> tuple[Params, Stats]:
        encoder_key, head_key = jax.random.split(key)
        tokens, encoder = self.init_encoder(encoder_key, batch)
        head = self._head.init(head_key, tokens[:, 0])
        width = self.encoder.width
        stats = {"mean": jnp.zeros(width), "variance": jnp.ones(width)}
        return {"encoder": encoder, "head": head["params"]}, stats

    def loss(
        self, params: Params, state, batch: Batch, keys: Key[Array, " b"]
    ) -> tuple[Float[Array, ""], Aux]:
        del keys
        features = jax.lax.stop_gradient(self.features(params, batch["image"]))
        features = features.astype(accurate(features.dtype))
        mean, variance = features.mean(axis=0), features.var(axis=0)
        rows = len(features)
        new = {"mean": mean, "variance": variance * rows / max(rows - 1, 1)}
        stats = jax.tree.map(
            lambda old, new: (1 - self.momentum) * old + self.momentum * new,
            state.stats,
            jax.tree.map(lambda leaf: leaf.astype(jnp.float32), new),
        )
        logits = self._linear(params, features, mean, variance)
        targets = soft_labels(batch["label"], self.classes, smoothing=0.0)
        return label_loss(logits, targets, stats)

    def logits(
        self,
        params: Params,
        stats: Stats,
        images: UInt8[Array, "b h w c"] | Float[Array, "b h w c"],
    ) -> Float[Array, "b {self.classes}"]:
        features = self.features(params, images)
        features = features.astype(accurate(features.dtype))
        return self._linear(params, features, stats["mean"], stats["variance"])

    def _linear(
        self,
        params: Params,
        features: Float[Array, "b d"],
        mean: Float[Array, " d"],
        variance: Float[Array, " d"],
    ) -> Float[Array, "b {self.classes}"]:
        mean, variance = (x.astype(features.dtype)[None] for x in (mean, variance))
        standard = (features - mean) * jax.lax.rsqrt(variance + _EPSILON)
        return apply(self._head, params["head"], standard)

    @property
    def _head(self) -> Classifier:
        # In float32: the head's cost is negligible beside the encoder's.
        return Classifier(
            classes=self.classes,
            deviation=self.deviation,
            dtype=str(accurate(self.encoder.dtype)),
        )

    def teacher(self, old: Params | None, params: Params, step: Array) -> None:
        return None

    def flops(self, image_shape: tuple[int, int, int]) -> float:
        size = self.grid(image_shape).size
        head = 2 * self.encoder.width * self.classes
        return self.encoder.flops(size, image_shape[2]) + 3 * head
