# SPDX-License-Identifier: Apache-2.0
"""An encoder alone, whose weights come from elsewhere."""

import dataclasses
from typing import Literal, NoReturn

import jax
from jaxtyping import Array, Float, Key

from mim_jax.models.vit import SIZES, Encoder
from mim_jax.objectives.base import Aux, Batch, Objective, Params, Stats, first_mask
from mim_jax.schema import within


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderOnly(Objective):
    """An encoder that another program trained, without what it was trained with.

    `python -m mim_jax.weights import` makes runs of it. Evaluations measure them, and
    other runs begin with them; nothing can be learned.

    Attributes:
        encoder: the network.
        pool: feature of an image: class token or mean of patch tokens.
        hide: how hidden patches reach the encoder: left out, or replaced by its mask
            token.
        mean, std: of the data, per channel, for pixels in 0..1.
    """

    encoder: Encoder = Encoder(**SIZES["B"])
    pool: Literal["cls", "avg"] = "cls"
    hide: Literal["drop", "mask_token"] = "drop"
    mean: tuple[float, ...] = within((0.485, 0.456, 0.406), least=0, most=1)
    std: tuple[float, ...] = within((0.229, 0.224, 0.225), least=1e-3, most=10)

    @property
    def occlusion(self) -> Literal["drop", "mask_token"]:
        return self.hide

    @property
    def feature(self) -> Literal["cls", "avg"]:
        return self.pool

    def check_shape(self, image_shape: tuple[int, int, int]) -> None:
        self.check_encoder(image_shape)
        _refuse()

    def init(self, key: Key[Array, ""], batch: Batch) -> tuple[Params, Stats]:
        mask = None
        if self.hide == "mask_token":
            mask = first_mask(self.grid(batch["image"].shape[1:]), visible=1)
        _, encoder = self.init_encoder(key, batch, mask)
        return {"encoder": encoder}, {}

    def loss(
        self, params: Params, state, batch: Batch, keys: Key[Array, " b"]
    ) -> tuple[Float[Array, ""], Aux]:
        _refuse()

    def teacher(self, old: Params | None, params: Params, step: jax.Array) -> None:
        return None

    def flops(self, image_shape: tuple[int, int, int]) -> float:
        size = self.grid(image_shape).size
        return self.encoder.flops(size, image_shape[2])


def _refuse() -> NoReturn:
    raise ValueError(
        "objective 'encoder' has no loss, so that it cannot be trained: want another "
        "objective that begins with it, by --config.init_from.run"
    )
