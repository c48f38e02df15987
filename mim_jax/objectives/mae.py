# SPDX-License-Identifier: Apache-2.0
"""Masked autoencoder."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

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
)
from mim_jax.ops import augment, losses
from mim_jax.ops.augment import ColorJitter
from mim_jax.ops.masking import Mask, take, unshuffle
from mim_jax.ops.patches import (
    Grid,
    grid_of,
    normalise_patches,
    patch_statistics,
    patchify,
    unpatchify,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MAE(PixelObjective):
    """Masked autoencoder, arXiv:2111.06377; Eq. (3) of arXiv:2208.04164.

    Attributes:
        encoder, decoder: the two networks.
        masking: which patches are hidden.
        normalise_target: predict patches with their own mean and deviation removed.
        color_jitter: "whole" jitters the image before anything else, "input_only" what
            the encoder sees and not the target (table 4 of arXiv:2208.04164).
        jitter: how much.
        mean, std: of the data, per channel, for pixels in 0..1.
    """

    encoder: Encoder = Encoder(**SIZES["B"])
    decoder: Decoder = Decoder()
    masking: Masking = Random(ratio=0.75)
    normalise_target: bool = True
    color_jitter: Literal["none", "whole", "input_only"] = "none"
    jitter: ColorJitter = ColorJitter()
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def check(self, image_shape: tuple[int, int, int]) -> None:
        channels = image_shape[2]
        self.encoder.check()
        self.decoder.check()
        self.masking.kept(self.grid(image_shape))
        if not len(self.mean) == len(self.std) == channels or min(self.std) <= 0:
            raise ValueError(
                f"mean={self.mean}, std={self.std} for images of {channels} channel(s):"
                " want one number per channel, std > 0"
            )
        if self.color_jitter != "none" and channels != 3:
            raise ValueError(
                f"color_jitter={self.color_jitter!r} for images of {channels} "
                "channel(s): want 3, or color_jitter='none'"
            )

    def init(self, key: Key[Array, ""], batch: Batch) -> tuple[Params, Stats]:
        images = batch["image"][:1]
        patches, grid = self._patches(augment.to_float(images))
        mask = self.masking(jax.random.split(key, 1), grid)
        encoder_key, decoder_key = jax.random.split(key)
        (tokens, _), encoder = self.encoder.init_with_output(
            encoder_key, patches, grid, mask.keep
        )
        decoder = self.decoder.init(decoder_key, tokens, mask, grid, patches.shape[-1])
        return {"encoder": encoder["params"], "decoder": decoder["params"]}, {}

    def loss(
        self, params: Params, state, batch: Batch, keys: Key[Array, " b"]
    ) -> tuple[Float[Array, ""], Aux]:
        images = augment.to_float(batch["image"])
        seen = images
        if self.color_jitter != "none":
            seen = self.jitter(images, jax.vmap(jax.random.fold_in, (0, None))(keys, 1))
        if self.color_jitter == "whole":
            images = seen
        patches, grid = self._patches(seen)
        mask = self.mask(batch, keys)
        tokens, _ = apply(self.encoder, params["encoder"], patches, grid, mask.keep)
        outputs = patches.shape[-1]
        prediction = apply(self.decoder, params["decoder"], tokens, mask, grid, outputs)
        patches, _ = self._patches(images)
        target = take(patches, mask.drop)
        if self.normalise_target:
            target = normalise_patches(target)
        errors = losses.patch_mse(prediction, target)
        # Every image hides the same number of patches, so this is Eq. (3)'s mean.
        weight = jnp.asarray(errors.size, errors.dtype)
        return errors.mean(), Aux(weight=weight, stats={}, metrics={})

    def teacher(self, old: Params | None, params: Params, step: Array) -> None:
        return None

    def grid(self, image_shape: tuple[int, ...]) -> Grid:
        return grid_of(image_shape[0], image_shape[1], self.encoder.patch)

    def flops(self, image_shape: tuple[int, int, int]) -> float:
        channels = image_shape[2]
        grid = self.grid(image_shape)
        visible = self.masking.kept(grid)
        encoder = self.encoder.flops(visible, channels)
        outputs = self.encoder.patch**2 * channels
        decoder = self.decoder.flops(visible, grid, self.encoder.width, outputs)
        return 3 * (encoder + decoder)

    def mask(self, batch: Batch, keys: Key[Array, " b"]) -> Mask:
        if "mask" in batch:
            return batch["mask"]
        return self.masking(keys, self.grid(batch["image"].shape[1:]))

    def reconstruct(
        self, params: Params, batch: Batch, mask: Mask
    ) -> Float[Array, "b h w c"]:
        patches, grid = self._patches(augment.to_float(batch["image"]))
        tokens, _ = apply(self.encoder, params["encoder"], patches, grid, mask.keep)
        outputs = patches.shape[-1]
        prediction = apply(
            self.decoder, params["decoder"], tokens, mask, grid, outputs, predict="all"
        )
        prediction = unshuffle(prediction.astype(patches.dtype), mask)
        if self.normalise_target:
            mean, deviation = patch_statistics(patches)
            prediction = prediction * deviation + mean
        return augment.denormalise(unpatchify(prediction, grid), self.mean, self.std)

    def _patches(
        self, images: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b n p"], Grid]:
        grid = self.grid(images.shape[1:])
        standard = augment.normalise(images, self.mean, self.std)
        return patchify(standard, grid.patch), grid
