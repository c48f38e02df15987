# SPDX-License-Identifier: Apache-2.0
"""BEiT: predicts the tokens of hidden patches from the visible patches."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from mim_jax.maskings.base import Masking
from mim_jax.maskings.block import Block
from mim_jax.models.heads import Classifier
from mim_jax.models.vit import SIZES, Encoder
from mim_jax.objectives.base import (
    Aux,
    Batch,
    Objective,
    Params,
    Stats,
    apply,
    first_mask,
    purpose,
)
from mim_jax.ops.augment import ColorJitter
from mim_jax.ops.masking import Mask, masks_of, take
from mim_jax.ops.patches import to_float
from mim_jax.schema import within
from mim_jax.tokenizers.base import Tokenizer
from mim_jax.tokenizers.kmeans import KMeans


@dataclasses.dataclass(frozen=True, kw_only=True)
class BEiT(Objective):
    """Masked image modelling of BEiT, arXiv:2106.08254, Eq. (2).

    The encoder sees all positions; a learned mask token replaces hidden patches. At
    these positions a linear head predicts the hidden patch's token of a vocabulary.

    Departures from the paper: no drop path, and relative position bias and layer scale
    only where the encoder's relative_positions and layer_scale say so; `tokenizer`
    gives the tokens, by default k-means instead of a discrete VAE.

    Attributes:
        encoder: the network that is learned.
        tokenizer: gives each patch its token.
        masking: which patches are hidden.
        color_jitter: "whole" jitters the image first: both the encoder and the
            tokenizer get the jittered image.
        jitter: strength of the jitter; the paper's by default.
        mean, std: of the data, per channel, for pixels in 0..1.
    """

    encoder: Encoder = Encoder(**SIZES["B"])
    tokenizer: Tokenizer = KMeans()
    masking: Masking = Block(ratio=0.4)
    color_jitter: Literal["none", "whole"] = "none"
    jitter: ColorJitter = ColorJitter(hue=0.0, p=1.0, gray_p=0.0)
    mean: tuple[float, ...] = within((0.485, 0.456, 0.406), least=0, most=1)
    std: tuple[float, ...] = within((0.229, 0.224, 0.225), least=1e-3, most=10)

    @property
    def occlusion(self) -> Literal["drop", "mask_token"]:
        return "mask_token"

    @property
    def feature(self) -> Literal["cls", "avg"]:
        # The loss reads only patch tokens, and the paper's classifier reads their mean.
        return "avg"

    def check_shape(self, image_shape: tuple[int, int, int]) -> None:
        self.check_encoder(image_shape)
        self.tokenizer.check_shape(image_shape)
        if self.color_jitter != "none":
            self.jitter.check_channels(image_shape[2])
        grid = self.grid(image_shape)
        if self.masking.visible_count(grid) == grid.size:
            raise ValueError(
                "masking hides nothing, so there is no token to predict; want one that "
                "hides patches, such as 'block'"
            )

    def init(self, key: Key[Array, ""], batch: Batch) -> tuple[Params, Stats]:
        grid = self.grid(batch["image"].shape[1:])
        mask = first_mask(grid, self.masking.visible_count(grid))
        encoder_key, head_key = jax.random.split(key)
        tokens, encoder = self.init_encoder(encoder_key, batch, mask)
        head = self._head.init(head_key, tokens)
        return {"encoder": encoder, "head": head["params"]}, {}

    def loss(
        self, params: Params, state, batch: Batch, keys: Key[Array, " b"]
    ) -> tuple[Float[Array, ""], Aux]:
        images = to_float(batch["image"])
        if self.color_jitter != "none":
            images = self.jitter(images, purpose(keys, 1))
        grid = self.grid(images.shape[1:])
        mask = masks_of(self.masking, batch, keys, grid, state)
        logits = self.logits(params, images, mask)
        tokens = self.tokenizer(images, grid)
        wanted = take(tokens[:, :, None], mask.drop)
        scores = jax.nn.log_softmax(logits, axis=-1)
        errors = -jnp.take_along_axis(scores, wanted, axis=-1)
        right = (logits.argmax(axis=-1) == wanted[:, :, 0]).astype(logits.dtype)
        weight = jnp.asarray(errors.size, logits.dtype)
        metrics = {"accuracy": right.mean()}
        return errors.mean(), Aux(weight=weight, stats={}, metrics=metrics)

    def logits(
        self, params: Params, images: Float[Array, "b h w c"], mask: Mask
    ) -> Float[Array, "b m v"]:
        """Logits over the vocabulary at each hidden patch, in the order of `mask.drop`;
        images are in 0..1."""
        tokens, _ = self.encode_masked(params, images, mask)
        return apply(self._head, params["head"], take(tokens[:, 1:], mask.drop))

    @property
    def _head(self) -> Classifier:
        return Classifier(
            classes=self.tokenizer.vocabulary, deviation=0.02, dtype=self.encoder.dtype
        )

    def teacher(self, old: Params | None, params: Params, step: Array) -> None:
        return None

    def flops(self, image_shape: tuple[int, int, int]) -> float:
        # The tokenizer is no part of the model and is not counted.
        grid = self.grid(image_shape)
        hidden = grid.size - self.masking.visible_count(grid)
        head = 2 * hidden * self.encoder.width * self.tokenizer.vocabulary
        return 3 * (self.encoder.flops(grid.size, image_shape[2]) + head)
