# SPDX-License-Identifier: Apache-2.0
"""Masked autoencoder."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from mim_jax.maskings.base import Masking
from mim_jax.maskings.random import Random
from mim_jax.models.decoder import Decoder
from mim_jax.models.vit import SIZES, Encoder
from mim_jax.objectives.base import (
    AutoEncoder,
    Aux,
    Batch,
    Params,
    Stats,
    check_boundary,
    purpose,
)
from mim_jax.ops.augment import ColorJitter
from mim_jax.ops.boundary import interior, interior_errors
from mim_jax.ops.masking import Mask, masks_of, take
from mim_jax.ops.mix import cutmix
from mim_jax.ops.patches import (
    Grid,
    normalise_patches,
    patch_mse,
    patchify,
    standard_patches,
    to_float,
)
from mim_jax.schema import within


class Views(NamedTuple):
    """The images that the encoder sees, and the images that are predicted.

    Attributes:
        seen: images in 0..1 that the encoder sees.
        clean: images in 0..1 that are predicted.
        pasted: True at pixels of `seen` that show another image; None: no such pixels.
    """

    seen: Float[Array, "b h w c"]
    clean: Float[Array, "b h w c"]
    pasted: Bool[Array, "b h w"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MAE(AutoEncoder):
    """Masked autoencoder, arXiv:2111.06377; Eq. (3) of arXiv:2208.04164.

    Attributes:
        encoder, decoder: the two networks.
        masking: which patches are hidden. With "none" the decoder predicts all patches
            of the clean image. With "none", cutmix and no colour jitter, the loss
            counts only the patches that the paste touches (arXiv:2208.04164, table 5).
        normalise_target: predict patches with their own mean and deviation removed.
        color_jitter: "whole" jitters the image first, so that the target is jittered
            too; "input_only" jitters what the encoder sees, but not the target
            (arXiv:2208.04164, table 4).
        jitter: strength of the jitter.
        cutmix: paste a box of another image into what the encoder sees, but not into
            the target.
        ignore_boundary: pixels: hidden pixels at most so far from a visible one do not
            count in the loss (arXiv:2306.04898, section 3.6); 0: all count.
        boundary: "hard", or "soft": the weight of such pixels grows with the distance
            instead, see `mim_jax.ops.boundary.interior`.
        mean, std: of the data, per channel, for pixels in 0..1.
    """

    encoder: Encoder = Encoder(**SIZES["B"])
    decoder: Decoder = Decoder()
    masking: Masking = Random(ratio=0.75)
    normalise_target: bool = True
    color_jitter: Literal["none", "whole", "input_only"] = "none"
    jitter: ColorJitter = ColorJitter()
    cutmix: bool = False
    ignore_boundary: int = within(0, least=0, most=2**13)
    boundary: Literal["hard", "soft"] = "hard"
    mean: tuple[float, ...] = within((0.485, 0.456, 0.406), least=0, most=1)
    std: tuple[float, ...] = within((0.229, 0.224, 0.225), least=1e-3, most=10)

    @property
    def batch_coupled(self) -> bool:
        return self.cutmix

    def check_shape(self, image_shape: tuple[int, int, int]) -> None:
        self.check_networks(image_shape)
        soft = self.boundary == "soft"
        check_boundary(self.masking, self.grid(image_shape), self.ignore_boundary, soft)
        if self.color_jitter != "none":
            self.jitter.check_channels(image_shape[2])

    def init(self, key: Key[Array, ""], batch: Batch) -> tuple[Params, Stats]:
        return self.init_networks(key, batch), {}

    def loss(
        self, params: Params, state, batch: Batch, keys: Key[Array, " b"]
    ) -> tuple[Float[Array, ""], Aux]:
        seen, clean, pasted = self.views(batch, keys)
        patches, grid = standard_patches(seen, self.encoder.patch, self.mean, self.std)
        mask = masks_of(self.masking, batch, keys, grid, state)
        prediction, predicted = self.predict(params, patches, grid, mask)
        target = self.target(clean, predicted)
        errors = patch_mse(prediction, target)
        weight = jnp.asarray(errors.size, errors.dtype)
        if pasted is not None or self.ignore_boundary:
            errors, weight = self._counted(prediction, target, mask, grid, pasted)
        return errors.sum() / jnp.maximum(weight, 1), Aux(weight, stats={}, metrics={})

    def views(self, batch: Batch, keys: Key[Array, " b"]) -> Views:
        """The images that the encoder sees, and those that it has to predict."""
        images = to_float(batch["image"])
        if self.color_jitter == "none" and not self.cutmix:
            return Views(images, images, None)
        return self._augmented(images, keys)

    def _augmented(self, clean: Float[Array, "b h w c"], keys) -> Views:
        """Views by colour jitter and cutmix, tables 4 and 5 of arXiv:2208.04164."""
        seen, pasted = clean, None
        if self.color_jitter != "none":
            seen = self.jitter(clean, purpose(keys, 1))
        if self.color_jitter == "whole":
            clean = seen
        if self.cutmix:
            seen, pasted = cutmix(seen, purpose(keys, 2))
        return Views(seen, clean, pasted)

    def predict(
        self, params: Params, patches: Float[Array, "b n p"], grid: Grid, mask: Mask
    ) -> tuple[Float[Array, "b m p"], Int[Array, "b m"]]:
        """Predictions of the hidden patches, and the indices of these patches.

        If the mask hides nothing, all patches are predicted.
        """
        masked, outputs = mask.drop.shape[1] > 0, patches.shape[-1]
        encoder, decoder = ({"params": params[name]} for name in ("encoder", "decoder"))
        tokens, _ = self.encoder.apply(encoder, patches, grid, mask.keep)
        where = "hidden" if masked else "visible"
        filled: Any = self.decoder.apply(decoder, tokens, mask, grid, outputs, where)
        return filled, mask.drop if masked else mask.keep

    def target(
        self, clean: Float[Array, "b h w c"], predicted: Int[Array, "b m"]
    ) -> Float[Array, "b m p"]:
        """The standardised patches at the predicted positions; each is normalised if
        `normalise_target` is True."""
        patches, _ = standard_patches(clean, self.encoder.patch, self.mean, self.std)
        target = take(patches, predicted)
        return normalise_patches(target) if self.normalise_target else target

    def _counted(self, prediction, target, mask: Mask, grid: Grid, pasted):
        """Weighted errors, and the sum of the weights, where not all count alike: near
        a boundary that is ignored, or at patches that no paste touches.

        If the mask hides patches, or colours are jittered, a paste changes no weight.
        """
        if self.ignore_boundary:
            soft = self.boundary == "soft"
            weights = interior(mask, grid, self.ignore_boundary, soft)
            errors, weights = interior_errors(prediction, target, weights)
            return errors, weights.sum()
        errors = patch_mse(prediction, target)
        if mask.drop.shape[1] or self.color_jitter != "none":
            return errors, jnp.asarray(errors.size, errors.dtype)
        weights = patchify(pasted[..., None], self.encoder.patch).any(axis=-1)
        weights = weights.astype(errors.dtype)
        return weights * errors, weights.sum()

    def teacher(self, old: Params | None, params: Params, step: Array) -> None:
        return None

    def flops(self, image_shape: tuple[int, int, int]) -> float:
        grid = self.grid(image_shape)
        visible = self.masking.visible_count(grid)
        encoder = self.encoder.flops(visible, image_shape[2])
        predicted = grid.size - visible or grid.size
        return 3 * (encoder + self.decoder_flops(visible, image_shape, predicted))
