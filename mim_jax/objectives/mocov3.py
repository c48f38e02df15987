# SPDX-License-Identifier: Apache-2.0
"""MoCo v3, the contrastive baseline of arXiv:2208.04164."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from mim_jax.models.heads import Head, check_heads, init_heads
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
from mim_jax.ops.augment import ColorJitter
from mim_jax.ops.contrastive import info_nce
from mim_jax.ops.ema import EMA
from mim_jax.ops.patches import to_float
from mim_jax.schema import check_ranges, internal, within


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoCoV3(Objective):
    """MoCo v3 for ViT, arXiv:2104.02057, algorithm 1.

    The loss pulls the class token of one crop towards the class token that a momentum
    encoder gives the other crop, and away from those of other images of the batch. The
    target of step t is the average updated with the momentum of step t, as in the
    released code.

    Attributes:
        encoder: the network that is learned. Its patch embedding keeps its first
            values, section 4 of the paper.
        projector, predictor: heads.
        temperature: of the softmax; the loss is multiplied by twice its value.
        view1, view2: augmentation of each crop.
        ema: momentum of the target.
        mean, std: of the data, per channel, for pixels in 0..1.
        total_steps: steps of the run; `for_run` sets it.
    """

    reads = ("image", "image2")

    encoder: Encoder = Encoder(**SIZES["B"])
    projector: Head = Head(
        layers=3, hidden=4096, out=256, activation="relu", last_norm=True
    )
    predictor: Head = Head(
        layers=2, hidden=4096, out=256, activation="relu", last_norm=True
    )
    temperature: float = within(0.2, least=1e-4, most=1e4)
    view1: ColorJitter = ColorJitter(saturation=0.2, blur_p=1.0)
    view2: ColorJitter = ColorJitter(saturation=0.2, blur_p=0.1, solarize_p=0.2)
    ema: EMA = EMA(base=0.99, schedule="cosine")
    mean: tuple[float, ...] = within((0.485, 0.456, 0.406), least=0, most=1)
    std: tuple[float, ...] = within((0.229, 0.224, 0.225), least=1e-3, most=10)
    total_steps: int = internal(1)

    def __post_init__(self):
        check_ranges(self)

    @property
    def batch_coupled(self) -> bool:
        return True

    @property
    def frozen(self) -> tuple[str, ...]:
        return ("encoder/embed",)

    def for_run(self, total_steps: int) -> "MoCoV3":
        return dataclasses.replace(self, total_steps=total_steps)

    def check_shape(self, image_shape: tuple[int, int, int]) -> None:
        self.check_encoder(image_shape)
        check_heads(self.projector, self.predictor)
        for view in (self.view1, self.view2):
            view.check_channels(image_shape[2])

    def init(self, key: Key[Array, ""], batch: Batch) -> tuple[Params, Stats]:
        encoder_key, projector_key, predictor_key = jax.random.split(key, 3)
        tokens, made = self.init_encoder(encoder_key, batch)
        encoder: dict[str, Any] = dict(made)
        # The released code starts with a class token near 0, a patch bias of 0, and
        # query, key and value with the Xavier bound of three separate square matrices.
        encoder["cls_token"] = encoder["cls_token"] * (1e-6 / 0.02)
        encoder["embed"] = encoder["embed"] | {
            "bias": jnp.zeros_like(encoder["embed"]["bias"])
        }
        for name in [name for name in encoder if name.startswith("block")]:
            attention = encoder[name]["attn"]
            qkv = attention["qkv"] | {"kernel": attention["qkv"]["kernel"] * 2**0.5}
            encoder[name] = encoder[name] | {"attn": attention | {"qkv": qkv}}
        heads = init_heads(
            self.projector, self.predictor, (projector_key, predictor_key), tokens[:, 0]
        )
        return {"encoder": encoder, **heads}, {}

    def loss(
        self, params: Params, state, batch: Batch, keys: Key[Array, " b"]
    ) -> tuple[Float[Array, ""], Aux]:
        one = self.view1(to_float(batch["image"]), purpose(keys, 10))
        two = self.view2(to_float(batch["image2"]), purpose(keys, 11))
        loss = self._direction(params, state.teacher, one, two)
        loss = loss + self._direction(params, state.teacher, two, one)
        weight = jnp.asarray(keys.shape[0], loss.dtype)
        return loss, Aux(weight=weight, stats={}, metrics={})

    def _direction(
        self, params: Params, teacher: Params, online: Array, target: Array
    ) -> Float[Array, ""]:
        query = self._projected(params, online)
        query = apply(self.predictor, params["predictor"], query)
        key = jax.lax.stop_gradient(self._projected(teacher, target))
        each = info_nce(query[:, None], key[:, None], self.temperature)
        return each.mean() * (2 * self.temperature)

    def _projected(
        self, params: Params, images: Float[Array, "b h w c"]
    ) -> Float[Array, "b d"]:
        tokens, _ = self.encode(params, images)
        return apply(self.projector, params["projector"], tokens[:, 0])

    def teacher(self, old: Params | None, params: Params, step: Array) -> Params:
        new = {name: params[name] for name in ("encoder", "projector")}
        # The momentum is that of the next step, which uses this teacher.
        return self.ema.update(old, new, step + 1, self.total_steps)

    def flops(self, image_shape: tuple[int, int, int]) -> float:
        grid = self.grid(image_shape)
        target = self.encoder.flops(grid.size, image_shape[2])
        target += self.projector.flops(self.encoder.width)
        online = target + self.predictor.flops(self.projector.out)
        return 2 * (3 * online + target)
