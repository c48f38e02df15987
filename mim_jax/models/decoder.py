# SPDX-License-Identifier: Apache-2.0
"""The mask-token decoder of masked autoencoders."""

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mim_jax.kernels.base import PLAIN, Kernels
from mim_jax.models.vit import (
    Dense,
    LayerNorm,
    check_width,
    layer_flops,
    positions,
    run_blocks,
)
from mim_jax.ops.attention import accurate
from mim_jax.ops.masking import Mask
from mim_jax.ops.patches import Grid
from mim_jax.schema import check_ranges, internal, shared, within

_INIT = nn.initializers.normal(0.02)


class Decoder(nn.Module):
    """Small ViT that predicts patches from mask tokens, arXiv:2111.06377, section 3.

    Tokens stay in the order class, visible, hidden. Attention does not depend on the
    order of tokens, so training never restores the grid order.

    Attributes:
        width, depth, heads: token width, number of blocks, attention heads.
        mlp_ratio: hidden width of the MLP divided by the token width.
        positions: "fixed": sines and cosines, and 0 for the class token. "learned":
            parameters that start from these.
        epsilon: what layer norms add to the variance.
        dtype, remat, kernels: as in Encoder.
    """

    width: int = within(512, least=4, most=2**17)
    depth: int = within(8, least=1, most=1000)
    heads: int = within(16, least=1, most=2**15)
    mlp_ratio: float = within(4.0, least=0.01, most=1000)
    positions: Literal["fixed", "learned"] = "fixed"
    epsilon: float = within(1e-6, above=0, most=0.1)
    layer_scale: None = internal(None)
    dtype: str = shared("float32")
    remat: str = shared("none")
    kernels: Kernels = internal(PLAIN)

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "b t d"],
        mask: Mask,
        grid: Grid,
        outputs: int,
        predict: Literal["hidden", "visible", "all"] = "hidden",
    ) -> Float[Array, "b m {outputs}"]:
        """Predictions for hidden patches, in the order of `mask.drop`.

        Args:
            tokens: encoder output: the class token, then the visible patches in the
                order of `mask.keep`.
            mask: visible and hidden patches of each image.
            grid: the patches of the images; static.
            outputs: number of values predicted per patch.
            predict: "visible" predicts visible patches instead, in the order of
                `mask.keep`. "all" predicts both, in the order keep, drop
                (`mim_jax.ops.masking.unshuffle` restores grid order).
        """
        x = Dense(self.width, self.dtype, self.kernels, name="embed")(tokens)
        # The gradients of tokens and positions are sums, which are made in float32.
        x = x.astype(accurate(self.dtype))
        first, table = (one.astype(x.dtype) for one in positions(self, grid))
        mask_token = self.param("mask_token", _INIT, (1, 1, self.width)).astype(x.dtype)
        # Visible tokens get positions here too: those that the encoder added have
        # another width.
        seen, hidden = x[:, 1:] + table[mask.keep], mask_token + table[mask.drop]
        x = jnp.concatenate([x[:, :1] + first, seen, hidden], 1).astype(self.dtype)
        x, _ = run_blocks(self, x)
        middle = 1 + mask.keep.shape[1]
        ends = {"hidden": (middle, None), "visible": (1, middle), "all": (1, None)}
        begin, end = ends[predict]
        x = LayerNorm(self.dtype, self.epsilon, name="norm")(x[:, begin:end])
        return Dense(outputs, self.dtype, self.kernels, name="predict")(x)

    def check_sizes(self) -> None:
        """ValueError if the sizes do not fit together."""
        check_ranges(self, "decoder.")
        check_width("decoder", self.width, self.heads, self.mlp_ratio)

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
