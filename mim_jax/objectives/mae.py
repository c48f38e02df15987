# SPDX-License-Identifier: Apache-2.0
"""Masked autoencoder."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from mim_jax.maskings.base import Masking
from mim_jax.maskings.random import Random
from mim_jax.models.decoder import Decoder
from mim_jax.models.vit import SIZES, Encoder
from mim_jax.objectives.base import (
    Aux,
    Batch,
    Params,
    PixelObjective,
    Stats,
    apply,
    purpose,
)
from mim_jax.ops import augment, losses
from mim_jax.ops.augment import ColorJitter
from mim_jax.ops.masking import take
from mim_jax.ops.patches import normalise_patches, patchify


@dataclasses.dataclass(frozen=True, kw_only=True)
class MAE(PixelObjective):
    """Masked autoencoder, arXiv:2111.06377; Eq. (3) of arXiv:2208.04164.

    Attributes:
        encoder, decoder: the two networks.
        masking: which patches are hidden. With "none" the decoder predicts all patches
            of the clean image, or with cutmix alone those that the paste touches
            (arXiv:2208.04164, table 5).
        normalise_target: predict patches with their own mean and deviation removed.
        color_jitter: "whole" jitters the image before anything else, "input_only" what
            the encoder sees and not the target (table 4 of arXiv:2208.04164).
        jitter: how much.
        cutmix: paste a box of another image into what the encoder sees; the target
            stays clean.
        mean, std: of the data, per channel, for pixels in 0..1.
    """

    encoder: Encoder = Encoder(**SIZES["B"])
    decoder: Decoder = Decoder()
    masking: Masking = Random(ratio=0.75)
    normalise_target: bool = True
    color_jitter: Literal["none", "whole", "input_only"] = "none"
    jitter: ColorJitter = ColorJitter()
    cutmix: bool = False
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @property
    def batch_coupled(self) -> bool:
        return self.cutmix

    def check_shape(self, image_shape: tuple[int, int, int]) -> None:
        self.check_networks(image_shape)
        if self.color_jitter != "none":
            self.jitter.check_channels(image_shape[2])

    def init(self, key: Key[Array, ""], batch: Batch) -> tuple[Params, Stats]:
        return self.init_networks(key, batch), {}

    def loss(
        self, params: Params, state, batch: Batch, keys: Key[Array, " b"]
    ) -> tuple[Float[Array, ""], Aux]:
        images = augment.to_float(batch["image"])
        seen, pasted = images, None
        if self.color_jitter != "none":
            seen = self.jitter(images, purpose(keys, 1))
        if self.color_jitter == "whole":
            images = seen
        if self.cutmix:
            seen, pasted = augment.cutmix(seen, purpose(keys, 2))
        mask = self.mask(batch, keys)
        patches, grid = self.patches(seen)
        tokens, _ = apply(self.encoder, params["encoder"], patches, grid, mask.keep)
        masked = mask.drop.shape[1] > 0
        prediction = apply(
            self.decoder,
            params["decoder"],
            tokens,
            mask,
            grid,
            patches.shape[-1],
            predict="hidden" if masked else "visible",
        )
        wanted = mask.drop if masked else mask.keep
        patches, _ = self.patches(images)
        target = take(patches, wanted)
        if self.normalise_target:
            target = normalise_patches(target)
        errors = losses.patch_mse(prediction, target)
        weights = jnp.ones_like(errors)
        if pasted is not None and not masked and self.color_jitter == "none":
            weights = _touched(pasted, grid.patch).astype(errors.dtype)
        weight = weights.sum()
        mean = (weights * errors).sum() / jnp.maximum(weight, 1)
        return mean, Aux(weight=weight, stats={}, metrics={})

    def teacher(self, old: Params | None, params: Params, step: Array) -> None:
        return None

    def flops(self, image_shape: tuple[int, int, int]) -> float:
        grid = self.grid(image_shape)
        visible = self.masking.visible_count(grid)
        encoder = self.encoder.flops(visible, image_shape[2])
        predicted = grid.size - visible or grid.size
        return 3 * (encoder + self.decoder_flops(visible, image_shape, predicted))


def _touched(pasted: Bool[Array, "b h w"], patch: int) -> Bool[Array, "b n"]:
    return patchify(pasted[..., None], patch).any(axis=-1)
