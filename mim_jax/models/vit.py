# SPDX-License-Identifier: Apache-2.0
"""Vision transformer that sees a chosen subset of patches, in the details of MAE.

Parameter names are public, since checkpoints depend on them. They are per block,
`block00/attn/qkv/kernel`; a tree whose blocks are stacked under `blocks` (see
`mim_jax.state.stack_blocks`) runs the same network as one scanned loop.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from mim_jax.ops.attention import attend, attend_with_weights
from mim_jax.ops.backend import accurate, dense_dot
from mim_jax.ops.patches import Grid
from mim_jax.ops.posembed import sincos_2d
from mim_jax.schema import shared

SIZES: dict[str, dict[str, Any]] = {
    "Ti": dict(width=192, depth=12, heads=3),
    "S": dict(width=384, depth=12, heads=6),
    "B": dict(width=768, depth=12, heads=12),
    "L": dict(width=1024, depth=24, heads=16),
    "H": dict(width=1280, depth=32, heads=16, patch=14),
}

# What the backward pass keeps instead of computing it again.
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

TAPS = ("blocks", "attention")


def run_blocks(
    module: nn.Module,
    x: Float[Array, "b n d"],
    *,
    depth: int,
    heads: int,
    mlp_ratio: float,
    dtype: str,
    remat: str,
    taps: Sequence[str] = (),
    kept: Float[Array, "l 2 b"] | None = None,
) -> tuple[Float[Array, "b n d"], dict[str, Float[Array, "l ..."]]]:
    """`depth` blocks one after the other, as sub-modules of the calling module.

    Args:
        kept: factor of each branch of each block, from `drop_path`; None is 1.
    """
    scanned = module.has_variable("params", "blocks")
    cls = Block
    if remat != "none":
        # Outside a loop the compiler would merge the recomputation with the original.
        cls = nn.remat(Block, policy=REMAT[remat], prevent_cse=not scanned)
    fields: dict[str, Any] = dict(
        heads=heads, mlp_ratio=mlp_ratio, dtype=dtype, taps=tuple(taps)
    )
    if scanned:
        axes: dict[str, Any] = dict(
            variable_axes={"params": 0}, split_rngs={"params": False}
        )
        blocks = nn.scan(cls, length=depth, **axes)(name="blocks", **fields)
        return blocks(x) if kept is None else blocks(x, kept)
    seen = []
    for i in range(depth):
        branches = () if kept is None else (kept[i],)
        x, tap = cls(name=f"block{i:02d}", **fields)(x, *branches)
        seen.append(tap)
    return x, {name: jnp.stack([tap[name] for tap in seen]) for name in taps}


def drop_path(
    keys: Key[Array, " b"], depth: int, rate: float
) -> Float[Array, "{depth} 2 b"]:
    """Factors of the attention and MLP branches of each block: 0, or 1 / (1 - rate).

    Stochastic depth per image, arXiv:1603.09382: a branch is left out at a rate that
    grows linearly from 0 in the first block to `rate` in the last.
    """
    rates = jnp.asarray(np.linspace(0, rate, depth), jnp.float32)[:, None, None]
    drawn = jax.vmap(lambda key: jax.random.uniform(key, (depth, 2)))(keys)
    return jnp.where(jnp.moveaxis(drawn, 0, -1) >= rates, 1 / (1 - rates), 0.0)


def layer_flops(tokens: int, width: int, mlp_ratio: float) -> float:
    """FLOPs of one block's forward pass, a multiply-add counted as two."""
    matmuls = (8 + 4 * mlp_ratio) * tokens * width**2
    return matmuls + 4 * tokens**2 * width


def check_width(name: str, width: int, heads: int) -> None:
    """ValueError unless the heads divide the width and tables can be made for it."""
    if heads < 1 or width < 4 or width % heads or width % 4:
        raise ValueError(
            f"{name}.width={width}, {name}.heads={heads}: want a width that is a "
            "multiple of the number of heads and of 4"
        )


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x Phi(x), exact, in float32 at least, arXiv:1606.08415.

    By erf as PyTorch has it: jax's own takes erfc, which costs more everywhere.
    """
    wide = x.astype(accurate(x.dtype))
    return (0.5 * wide * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


def _norm(x, scale, bias):
    kind = accurate(x.dtype)
    wide = x.astype(kind)
    mean = wide.mean(axis=-1, keepdims=True)
    if x.dtype == kind:
        variance = jnp.square(wide - mean).mean(axis=-1, keepdims=True)
    else:
        # In one pass: what cancels is less than the rounding of such inputs.
        variance = jnp.square(wide).mean(axis=-1, keepdims=True) - jnp.square(mean)
        variance = jnp.maximum(variance, 0)
    wide = (wide - mean) * jax.lax.rsqrt(variance + 1e-6)
    wide = wide * scale.astype(kind)[None, None] + bias.astype(kind)[None, None]
    return wide.astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm with MAE's epsilon, in float32 at least.

    Flax's own mixes dtypes by implicit promotion, which our tests forbid.
    """

    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return _norm(x.astype(self.dtype), scale, bias)


class _Apart(nn.Module):
    """`xavier` that leaves its bias to who uses the product."""

    features: int
    dtype: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"]
    ) -> tuple[Float[Array, "b n e"], Float[Array, " e"]]:
        init = nn.initializers.xavier_uniform()
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        kernel, bias = (jnp.asarray(it, self.dtype) for it in (kernel, bias))
        axes = (((2,), (0,)), ((), ()))
        return dense_dot(x, kernel, axes, split=1), bias


class Attention(nn.Module):
    """Multi-head self-attention; q, k and v come from one fused matrix.

    Attributes:
        weights: return the softmax weights too, else None for them.
    """

    heads: int
    dtype: str
    weights: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"]
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b a n n"] | None]:
        width = x.shape[-1]
        # Xavier on the fused [d, 3d] matrix: its bound is sqrt(6 / 4d), sqrt(1/2) of
        # what three separate matrices would get.
        qkv, bias = _Apart(3 * width, self.dtype, name="qkv")(x)
        if self.weights:
            mixed, weights = attend_with_weights(qkv, bias, self.heads)
        else:
            mixed, weights = attend(qkv, bias, self.heads), None
        return xavier(width, self.dtype, name="out", split=0)(mixed), weights


class Block(nn.Module):
    """Pre-norm transformer block."""

    heads: int
    mlp_ratio: float
    dtype: str
    taps: tuple[str, ...] = ()

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], kept: Float[Array, "2 b"] | None = None
    ) -> tuple[Float[Array, "b n d"], dict[str, Float[Array, "..."]]]:
        def branch(y, number):
            if kept is None:
                return y
            return y * kept[number][:, None, None].astype(y.dtype)

        width = x.shape[-1]
        attention = Attention(
            self.heads, self.dtype, weights="attention" in self.taps, name="attn"
        )
        y, weights = attention(LayerNorm(self.dtype, name="ln1")(x))
        x = x + branch(y, 0)
        y = LayerNorm(self.dtype, name="ln2")(x)
        y = xavier(int(width * self.mlp_ratio), self.dtype, "fc1", split=1)(y)
        y = gelu(y)
        x = x + branch(xavier(width, self.dtype, "fc2", split=0)(y), 1)
        seen = {"blocks": x, "attention": weights}
        return x, {name: seen[name] for name in self.taps}


class Encoder(nn.Module):
    """ViT encoder over any subset of patches, arXiv:2111.06377 and 2010.11929.

    Attributes:
        patch: side of a patch in pixels.
        width, depth, heads: token width, number of blocks, attention heads; see SIZES.
        mlp_ratio: hidden width of the MLP over the token width.
        positions: "fixed" sines and cosines, or "learned": parameters that start as
            those, with a row for the class token first.
        norm: what the final norm is applied to: "tokens", each one, or "pooled", the
            mean of the patch tokens, while tokens are returned as they are.
        drop_path: share of images for which a branch of the last block is left out, in
            training; it grows linearly with depth.
        dtype: of activations; parameters are float32.
        remat: what the backward pass recomputes, a key of REMAT.
    """

    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    positions: Literal["fixed", "learned"] = "fixed"
    norm: Literal["tokens", "pooled"] = "tokens"
    drop_path: float = 0.0
    dtype: str = shared("float32")
    remat: str = shared("none")

    @nn.compact
    def __call__(
        self,
        patches: Float[Array, "b n p"],
        grid: Grid,
        keep: Int[Array, "b k"] | None = None,
        taps: Sequence[str] = (),
        hidden: Bool[Array, "b n"] | None = None,
        keys: Key[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b t d"], dict[str, Float[Array, "..."]]]:
        """Class token and patch tokens, after the final norm if that is theirs.

        Args:
            patches: standardised patches in grid order, all of them.
            grid: where the patches sit; static.
            keep: indices of the patches to see; None sees all, with no masking.
            taps: what to return besides, of TAPS: "blocks" is the tokens after each
                block "l b t d" (before the final norm), "attention" the softmax weights
                of each block "l b a t t".
            hidden: True where a learned mask token stands in for the patch, before the
                first block; its parameter exists if `hidden` was given to `init`.
            keys: of the images, for drop path; None drops nothing.
        Returns:
            (tokens, taps) with t = 1 + k, the class token first. With norm="pooled"
            taps hold "pooled" besides, the norm of the mean patch token "b d".
        Raises:
            ValueError: both keep and hidden are given.
        """
        if keep is not None and hidden is not None:
            raise ValueError("keep drops patches and hidden replaces them: want one")
        first, table = self._positions(grid)
        if keep is None:
            positions = table[None]
        else:
            # Select before embedding: hidden patches cost nothing.
            patches = jnp.take_along_axis(patches, keep[:, :, None], axis=1)
            positions = table[keep]
        # The reference embeds by a convolution, whose bias does not start at zero.
        bias = _uniform(patches.shape[-1] ** -0.5)
        x = xavier(self.width, self.dtype, name="embed", bias_init=bias)(patches)
        if hidden is not None:
            hole = self.param(
                "mask_token", nn.initializers.normal(0.02), (1, 1, self.width)
            )
            x = jnp.where(hidden[:, :, None], hole.astype(x.dtype), x)
        x = x + positions.astype(x.dtype)
        cls = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, self.width))
        cls = (cls + first).astype(x.dtype)
        cls = jnp.broadcast_to(cls, (x.shape[0], 1, self.width))
        kept = None
        if keys is not None and self.drop_path > 0:
            kept = drop_path(keys, self.depth, self.drop_path)
        x, seen = run_blocks(
            self,
            jnp.concatenate([cls, x], axis=1),
            depth=self.depth,
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            dtype=self.dtype,
            remat=self.remat,
            taps=taps,
            kept=kept,
        )
        norm = LayerNorm(self.dtype, name="norm")
        if self.norm == "tokens":
            return norm(x), seen
        pooled = norm(x[:, 1:].mean(axis=1, keepdims=True))[:, 0]
        return x, seen | {"pooled": pooled}

    def _positions(
        self, grid: Grid
    ) -> tuple[Float[Array, "1 1 d"], Float[Array, "n d"]]:
        """What is added to the class token, and to each patch token of the grid."""
        table = sincos_2d(grid, self.width)
        if self.positions == "fixed":
            return jnp.zeros((1, 1, self.width)), jnp.asarray(table, jnp.float32)

        def start(key, shape):
            del key
            whole = np.concatenate([np.zeros((1, shape[1])), table])
            return jnp.asarray(whole, jnp.float32)

        whole = jnp.asarray(self.param("pos_embed", start, (1 + grid.size, self.width)))
        return whole[None, :1], whole[1:]

    def check_sizes(self) -> None:
        """ValueError if the sizes do not fit together."""
        check_width("encoder", self.width, self.heads)
        if not 0 <= self.drop_path < 1:
            raise ValueError(
                f"encoder.drop_path={self.drop_path}: want 0 <= drop_path < 1"
            )

    def flops(self, visible: int, channels: int) -> float:
        """FLOPs of one forward pass of one image with `visible` patches."""
        embed = 2 * visible * self.patch**2 * channels * self.width
        layer = layer_flops(visible + 1, self.width, self.mlp_ratio)
        return embed + self.depth * layer


def xavier(
    features: int, dtype: str, name: str, split: int | None = None, **inits
) -> nn.Dense:
    """Dense layer with Xavier-uniform kernel and, unless told otherwise, zero bias.

    Args:
        split: the axis of the kernel that devices share, see `mim_jax.sharding.RULES`.
    """
    init = nn.initializers.xavier_uniform()
    return nn.Dense(
        features,
        dtype=dtype,
        kernel_init=init,
        dot_general=functools.partial(dense_dot, split=split),
        name=name,
        **inits,
    )


def _uniform(bound: float) -> nn.initializers.Initializer:
    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, minval=-bound, maxval=bound)

    return init
