# SPDX-License-Identifier: Apache-2.0
"""What a Mask R-CNN has behind its encoder: a pyramid of maps, and three heads.

Maps are "b h w c"; parameters of convolutions are named as those of linear layers, with
a kernel of height, width, channels in, channels out.
"""

from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mim_jax.models.heads import WideDense
from mim_jax.models.vit import LayerNorm, gelu
from mim_jax.ops.attention import accurate, repeated
from mim_jax.schema import check_ranges, shared, within

LEVELS = 4  # of the pyramid, at a quarter, a half, one and two patches

# That of He et al., arXiv:1502.01852, as in the reference for new convolutions.
_HE = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Conv(nn.Module):
    """Convolution with a bias; the map keeps its size.

    Attributes:
        features: output channels.
        side: of the kernel, in pixels.
        dtype: of the products.
        start: initialiser of the kernel.
    """

    features: int
    side: int
    dtype: str
    start: nn.initializers.Initializer = _HE

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w f"]:
        shape = (self.side, self.side, x.shape[-1], self.features)
        kernel = jnp.asarray(self.param("kernel", self.start, shape), self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return x + repeated(bias, x)


class Up(nn.Module):
    """Transposed convolution of 2 x 2 with stride 2: each pixel becomes four.

    As kernels do not overlap, it is a linear layer of each pixel.
    """

    features: int
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b _ _ f"]:
        shape = (2, 2, x.shape[-1], self.features)
        kernel = jnp.asarray(self.param("kernel", _HE, shape), self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        b, h, w, _ = x.shape
        x = jnp.einsum("bhwc,yxcf->bhywxf", x.astype(self.dtype), kernel)
        x = x.reshape(b, 2 * h, 2 * w, self.features)
        return x + repeated(bias, x)


class Norm(nn.Module):
    """Layer norm over the channels of each pixel."""

    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        flat = x.reshape(len(x), -1, x.shape[-1])
        return LayerNorm(self.dtype, name="norm")(flat).reshape(x.shape)


class Pyramid(nn.Module):
    """Maps of four scales from one map of patches.

    A quarter and half a patch come by transposed convolutions, two patches by max
    pooling.

    Attributes:
        kind: "fpn": a feature pyramid network, arXiv:1612.03144, follows: coarser maps
            are added to finer ones, as in MAE's transfer to detection,
            arXiv:2111.11429. "simple": ViTDet's simple feature pyramid,
            arXiv:2203.16527: each map has two convolutions with norms and none is
            added.
        width: channels of each map.
        dtype: of activations.
    """

    kind: Literal["fpn", "simple"] = "fpn"
    width: int = within(256, least=1, most=2**14)
    dtype: str = shared("float32")

    @nn.compact
    def __call__(self, x: Float[Array, "b h w d"]) -> list[Float[Array, "b _ _ f"]]:
        wide = x.shape[-1]
        half = max(1, wide // 2)
        scaled = [
            Up(max(1, wide // 4), self.dtype, name="up1")(
                gelu(Norm(self.dtype, name="norm0")(self._up(half, "up0")(x)))
            ),
            self._up(half, "up2")(x),
            x.astype(self.dtype),
            _pooled(x.astype(self.dtype)),
        ]
        if self.kind == "simple":
            return [self._simple(one, level) for level, one in enumerate(scaled)]
        maps = [
            Conv(self.width, 1, self.dtype, name=f"lateral{level}")(one)
            for level, one in enumerate(scaled)
        ]
        for level in reversed(range(len(maps) - 1)):
            above = jnp.repeat(jnp.repeat(maps[level + 1], 2, axis=1), 2, axis=2)
            maps[level] += above
        return [
            Conv(self.width, 3, self.dtype, name=f"out{level}")(one)
            for level, one in enumerate(maps)
        ]

    def _up(self, features: int, name: str) -> Up:
        return Up(features, self.dtype, name=name)

    def _simple(self, x, level: int):
        for number, side in enumerate((1, 3)):
            name = f"level{level}_{number}"
            x = Conv(self.width, side, self.dtype, name=f"{name}_conv")(x)
            x = Norm(self.dtype, name=f"{name}_norm")(x)
        return x

    def check_sizes(self) -> None:
        """ValueError if a size is out of range."""
        check_ranges(self, "pyramid.")

    def flops(self, places: int, wide: int) -> float:
        """FLOPs of one forward pass, for so many patches of so many numbers."""
        ups = 8 * places * wide * (wide // 2) * 2 + 32 * places * wide**2 / 8
        channels = (wide / 4, wide / 2, wide, wide)
        counts = [places * 4.0 ** (2 - level) for level in range(LEVELS)]
        convs = sum(
            2 * count * self.width * (one + 9 * self.width)
            for count, one in zip(counts, channels, strict=True)
        )
        return ups + convs


def _pooled(x):
    """The largest value of each 2 x 2 pixels."""
    # The gradient of `max` divides by the number of values that equal the largest; if
    # the compiler computes them again and rounds otherwise, that number is 0.
    x = jnp.maximum(x[:, ::2], x[:, 1::2])
    return jnp.maximum(x[:, :, ::2], x[:, :, 1::2])


class Proposer(nn.Module):
    """Region proposal network: how likely each anchor is an object, and the offsets of
    its box, arXiv:1506.01497. All levels share its parameters.

    Attributes:
        convs: convolutions before the outputs; ViTDet has two.
        dtype: of activations.
    """

    convs: int = within(2, least=1, most=100)
    dtype: str = shared("float32")

    @nn.compact
    def __call__(
        self, maps: Sequence[Float[Array, "b _ _ c"]], anchors: int
    ) -> list[tuple[Float[Array, "b _"], Float[Array, "b _ 4"]]]:
        """Of each level the logits and offsets, anchor by anchor.

        Args:
            anchors: their number at each place.
        """
        width, small = maps[0].shape[-1], nn.initializers.normal(0.01)
        convs = [
            Conv(width, 3, self.dtype, small, name=f"conv{number}")
            for number in range(self.convs)
        ]
        score = Conv(anchors, 1, self.dtype, small, name="score")
        offset = Conv(4 * anchors, 1, self.dtype, small, name="offset")
        found, kind = [], accurate(self.dtype)
        for x in maps:
            for conv in convs:
                x = jax.nn.relu(conv(x))
            logits = score(x).astype(kind).reshape(len(x), -1)
            offsets = offset(x).astype(kind).reshape(len(x), -1, 4)
            found.append((logits, offsets))
        return found

    def flops(self, places: float, width: int, anchors: int) -> float:
        """FLOPs of one forward pass over so many places of all levels."""
        return 2.0 * places * width * (9 * width * self.convs + 5 * anchors)


class BoxHead(nn.Module):
    """Class and box of a region: convolutions with norms, one hidden layer, two outputs
    (four convolutions in ViTDet, arXiv:2203.16527).

    Attributes:
        convs: number of convolutions.
        hidden: width of the hidden layer.
        dtype: of activations.
    """

    convs: int = within(4, least=0, most=100)
    hidden: int = within(1024, least=1, most=2**16)
    dtype: str = shared("float32")

    @nn.compact
    def __call__(
        self, regions: Float[Array, "r s s c"], classes: int
    ) -> tuple[Float[Array, "r k"], Float[Array, "r {classes} 4"]]:
        """Logits of each class and, last, of background; and the offsets that a region
        has as each class."""
        x, width = regions, regions.shape[-1]
        for number in range(self.convs):
            x = Conv(width, 3, self.dtype, name=f"conv{number}")(x)
            x = jax.nn.relu(Norm(self.dtype, name=f"norm{number}")(x))
        x = x.reshape(len(x), -1)
        x = jax.nn.relu(self._linear(self.hidden, "fc")(x)).astype(self.dtype)
        score = self._linear(classes + 1, "score", nn.initializers.normal(0.01))
        offset = self._linear(4 * classes, "offset", nn.initializers.normal(0.001))
        return score(x), offset(x).reshape(len(x), classes, 4)

    def _linear(self, features: int, name: str, start=None) -> WideDense:
        start = nn.initializers.xavier_uniform() if start is None else start
        return WideDense(features, start, self.dtype, name=name)

    def flops(self, side: int, width: int, classes: int) -> float:
        """FLOPs of one forward pass of one region."""
        convs = 18.0 * side**2 * width**2 * self.convs
        outputs = 2 * self.hidden * (5 * classes + 1)
        return convs + 2 * side**2 * width * self.hidden + outputs


class MaskHead(nn.Module):
    """Masks of a region, one for each class, at twice the region's resolution,
    arXiv:1703.06870.

    Attributes:
        convs: convolutions, with norms, before the resolution is doubled.
        dtype: of activations.
    """

    convs: int = within(4, least=0, most=100)
    dtype: str = shared("float32")

    @nn.compact
    def __call__(
        self, regions: Float[Array, "r s s c"], classes: int
    ) -> Float[Array, "r m m {classes}"]:
        x, width = regions, regions.shape[-1]
        for number in range(self.convs):
            x = Conv(width, 3, self.dtype, name=f"conv{number}")(x)
            x = jax.nn.relu(Norm(self.dtype, name=f"norm{number}")(x))
        x = jax.nn.relu(Up(width, self.dtype, name="up")(x))
        small = nn.initializers.normal(0.001)
        x = Conv(classes, 1, self.dtype, small, name="classes")(x)
        return x.astype(accurate(self.dtype))

    def flops(self, side: int, width: int, classes: int) -> float:
        """FLOPs of one forward pass of one region."""
        convs = 18.0 * side**2 * width**2 * self.convs
        return convs + 8 * side**2 * width * (width + classes)
