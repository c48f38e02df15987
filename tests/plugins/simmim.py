# SPDX-License-Identifier: Apache-2.0
"""SimMIM: an objective from outside the package.

PYTHONPATH=tests/plugins python -m mim_jax.main --plugins=simmim \
    --config=configs/mae.py:digits,objective=simmim \
    --config.objective.masking.unit=4 --workdir=runs/simmim
"""

import dataclasses

import jax
import jax.numpy as jnp

from mim_jax import config
from mim_jax.maskings.base import Masking
from mim_jax.maskings.random import Random
from mim_jax.models.vit import SIZES, Dense, Encoder
from mim_jax.objectives.base import Aux, PixelObjective, apply, first_mask
from mim_jax.ops.masking import masks_of, take
from mim_jax.ops.patches import denormalise, to_float, unpatchify


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimMIM(PixelObjective):
    """Pixels of hidden patches by a linear layer, arXiv:2111.09886.

    Attributes:
        encoder: sees all positions, with a learned token in place of hidden patches.
        masking: which patches are hidden; the paper hides squares of 32 pixels.
        mean, std: of the data, per channel, for pixels in 0..1.
    """

    encoder: Encoder = Encoder(**SIZES["B"])
    masking: Masking = Random(ratio=0.6, unit=32)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    # Raw pixels are predicted; no field of the config.
    normalise_target: bool = dataclasses.field(default=False, init=False)

    @property
    def occlusion(self):
        return "mask_token"

    @property
    def feature(self):
        return "avg"  # the loss reads patch tokens alone

    def check_shape(self, image_shape):
        self.check_encoder(image_shape)
        grid = self.grid(image_shape)
        if self.masking.visible_count(grid) == grid.size:
            raise ValueError("masking hides nothing: want one that hides patches")

    def init(self, key, batch):
        grid = self.grid(batch["image"].shape[1:])
        mask = first_mask(grid, self.masking.visible_count(grid))
        encoder_key, head_key = jax.random.split(key)
        tokens, encoder = self.init_encoder(encoder_key, batch, mask)
        head = self._head(batch["image"].shape[-1]).init(head_key, tokens)
        return {"encoder": encoder, "head": head["params"]}, {}

    def loss(self, params, state, batch, keys):
        images = to_float(batch["image"])
        mask = self.mask(batch, keys, state)
        target = take(self.patches(images)[0], mask.drop)
        prediction = take(self.predict(params, images, mask), mask.drop)
        errors = jnp.abs(prediction.astype(target.dtype) - target)
        weight = jnp.asarray(errors.size, errors.dtype)
        return errors.mean(), Aux(weight, stats={}, metrics={})

    def mask(self, batch, keys, state=None):
        grid = self.grid(batch["image"].shape[1:])
        return masks_of(self.masking, batch, keys, grid, state)

    def predict(self, params, images, mask):
        """Standardised pixels of all patches, from images in 0..1."""
        tokens, _ = self.encode_masked(params, images, mask)
        return apply(self._head(images.shape[-1]), params["head"], tokens[:, 1:])

    def reconstruct(self, params, batch, mask):
        images = to_float(batch["image"])
        patches = self.predict(params, images, mask).astype(images.dtype)
        pixels = unpatchify(patches, self.grid(images.shape[1:]))
        return denormalise(pixels, self.mean, self.std)

    def teacher(self, old, params, step):
        return None

    def flops(self, image_shape):
        size, width = self.grid(image_shape).size, self.encoder.width
        head = 2 * size * width * self.encoder.patch**2 * image_shape[2]
        return 3 * (self.encoder.flops(size, image_shape[2]) + head)

    def _head(self, channels):
        return Dense(self.encoder.patch**2 * channels, self.encoder.dtype)


config.register("simmim", SimMIM)
