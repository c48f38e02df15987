# SPDX-License-Identifier: Apache-2.0
"""The mask-token decoder of masked autoencoders."""

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mim_jax.models.vit import LayerNorm, check_width, layer_flops, run_blocks, xavier
from mim_jax.ops.masking import Mask
from mim_jax.ops.patches import Grid
from mim_jax.ops.posembed import sincos_2d
from mim_jax.schema import shared


class Decoder(nn.Module):
    """Small ViT that fills mask tokens in, arXiv:2111.06377, section 3.

    Tokens stay in the order class, visible, hidden: attention does not care for order,
    so nothing is ever put back into grid order in training.

    Attributes:
        width, depth, heads: token width, number of blocks, attention heads.
        mlp_ratio: hidden width of the MLP over the token width.
        dtype, remat: as in Encoder.
    """

    width: int = 512
    depth: int = 8
    heads: int = 16
    mlp_ratio: float = 4.0
    dtype: str = shared("float32")
    remat: str = shared("none")

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "b t d"],
        mask: Mask,
        grid: Grid,
        outputs: int,
        predict: Literal["hidden", "visible", "all"] = "hidden",
    ) -> Float[Array, "b m {outputs}"]:
        """Predictions at hidden patches, in the order of `mask.drop`.

        Args:
            tokens: encoder output, the class token first, then the visible patches in
                the order of `mask.keep`.
            outputs: numbers per patch.
            predict: "visible" predicts at visible patches instead, in the order of
                `mask.keep`; "all" at both, in the order keep, drop
                (`mim_jax.ops.masking.unshuffle` gives grid order).
        """
        table = jnp.asarray(sincos_2d(grid, self.width), jnp.float32)
        x = xavier(self.width, self.dtype, name="embed")(tokens)
        table = table.astype(x.dtype)
        hole = self.param(
            "mask_token", nn.initializers.normal(0.02), (1, 1, self.width)
        )
        # The class token has position zero; visible tokens get their position anew.
        x = jnp.concatenate(
            [
                x[:, :1],
                x[:, 1:] + table[mask.keep],
                hole.astype(x.dtype) + table[mask.drop],
            ],
            axis=1,
        )
        x, _ = run_blocks(
            self,
            x,
            depth=self.depth,
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            dtype=self.dtype,
            remat=self.remat,
        )
        middle = 1 + mask.keep.shape[1]
        first, last = {
            "hidden": (middle, None),
            "visible": (1, middle),
            "all": (1, None),
        }[predict]
        x = LayerNorm(self.dtype, name="norm")(x[:, first:last])
        return xavier(outputs, self.dtype, name="predict")(x)

    def check_sizes(self) -> None:
        """ValueError if the sizes do not fit together."""
        check_width("decoder", self.width, self.heads)

    def flops(
        self,
        visible: int,
        grid: Grid,
        encoder_width: int,
        outputs: int,
        predicted: int | None = None,
    ) -> float:
        """FLOPs of one forward pass of one image.

        Args:
            predicted: number of patches that are predicted; None: the hidden ones.
        """
        predicted = grid.size - visible if predicted is None else predicted
        embed = 2 * (visible + 1) * encoder_width * self.width
        layer = layer_flops(grid.size + 1, self.width, self.mlp_ratio)
        predict = 2 * predicted * self.width * outputs
        return embed + self.depth * layer + predict
