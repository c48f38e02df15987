# SPDX-License-Identifier: Apache-2.0
"""Vision transformer that sees a chosen subset of patches; details are those of MAE.

Parameter names are public, since checkpoints depend on them. Each block has its own,
e.g. `block00/attn/qkv/kernel`. If the parameters of all blocks are stacked under
`blocks` (see `mim_jax.state.stack_blocks`), the network runs its blocks as one loop.
"""

from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from mim_jax.kernels import attend
from mim_jax.kernels.base import PLAIN, Kernels
from mim_jax.kernels.spread import gathered
from mim_jax.ops.attention import accurate, attention
from mim_jax.ops.masking import take
from mim_jax.ops.patches import Grid, sincos_2d
from mim_jax.schema import internal, shared

SIZES: dict[str, dict[str, Any]] = {
    "Ti": dict(width=192, depth=12, heads=3),
    "S": dict(width=384, depth=12, heads=6),
    "B": dict(width=768, depth=12, heads=12),
    "L": dict(width=1024, depth=24, heads=16),
    "H": dict(width=1280, depth=32, heads=16, patch=14),
}

# What the forward pass saves for the backward pass, which recomputes the rest.
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

TAPS = ("blocks", "attention")


def run_blocks(
    network: Any,
    x: Float[Array, "b n d"],
    taps: Sequence[str] = (),
    scales: Float[Array, "l 2 b"] | None = None,
) -> tuple[Float[Array, "b n d"], dict[str, Float[Array, "l ..."]]]:
    """The blocks of an Encoder or Decoder, one after the other.

    Args:
        network: the calling module; the blocks become its sub-modules.
        taps: names from TAPS: further values to return, with a leading axis over the
            blocks.
        scales: factor of each branch of each block, from `drop_path`; None: 1.
    """
    fields = {name: getattr(network, name) for name in _OF_A_BLOCK}
    fields["taps"] = tuple(taps)
    cls, stacked = Block, network.has_variable("params", "blocks")
    if network.remat != "none":
        cls = _rematerialised(network.remat, stacked)
    if stacked:
        return _scanned(cls, network.depth, fields, x, scales)
    seen = []
    for i in range(network.depth):
        own = None if scales is None else scales[i]
        x, tap = cls(name=f"block{i:02d}", **fields)(x, own)
        seen.append(tap)
    return x, {name: jnp.stack([tap[name] for tap in seen]) for name in taps}


_OF_A_BLOCK = ("heads", "mlp_ratio", "dtype", "kernels")


def _rematerialised(remat: str, stacked: bool):
    """A block that saves what REMAT[remat] says and recomputes the rest in the backward
    pass."""
    # Outside a loop the compiler would merge the recomputation with the original.
    return nn.remat(Block, policy=REMAT[remat], prevent_cse=not stacked)


def _scanned(cls, depth: int, fields: dict[str, Any], x, scales):
    """The blocks as one loop over stacked parameters."""
    axes: dict[str, Any] = dict(
        variable_axes={"params": 0}, split_rngs={"params": False}
    )
    blocks = nn.scan(cls, length=depth, **axes)(name="blocks", **fields)
    return blocks(x) if scales is None else blocks(x, scales)


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
    """FLOPs of one block's forward pass; a multiply-add counts as two."""
    matmuls = (8 + 4 * mlp_ratio) * tokens * width**2
    return matmuls + 4 * tokens**2 * width


def check_width(name: str, width: int, heads: int) -> None:
    """ValueError unless the width is a multiple of the heads, and of 4 for the position
    tables."""
    if heads < 1 or width < 4 or width % heads or width % 4:
        raise ValueError(
            f"{name}.width={width}, {name}.heads={heads}: want a width that is a "
            "multiple of the number of heads and of 4"
        )


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x Phi(x), exact, in float32 at least, arXiv:1606.08415.

    It uses erf, as PyTorch does; JAX's own gelu uses erfc, which is slower everywhere.
    """
    wide = x.astype(accurate(x.dtype))
    return (0.5 * wide * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm with MAE's epsilon, in float32 at least.

    Flax's layer norm mixes dtypes by implicit promotion, which our tests forbid.
    """

    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        kind = accurate(self.dtype)
        wide = x.astype(self.dtype).astype(kind)
        mean = wide.mean(axis=-1, keepdims=True)
        if kind == self.dtype:
            variance = jnp.square(wide - mean).mean(axis=-1, keepdims=True)
        else:
            variance = _variance_in_one_pass(wide, mean)
        wide = (wide - mean) * jax.lax.rsqrt(variance + 1e-6)
        wide = wide * scale.astype(kind)[None, None] + bias.astype(kind)[None, None]
        return wide.astype(self.dtype)


def _variance_in_one_pass(wide, mean):
    # The error by cancellation is smaller than the rounding of half-precision inputs.
    variance = jnp.square(wide).mean(axis=-1, keepdims=True) - jnp.square(mean)
    return jnp.maximum(variance, 0)


class Dense(nn.Module):
    """Linear layer with a Xavier-uniform kernel and, unless told otherwise, zero bias.

    Attributes:
        features: output width.
        dtype: dtype of the matrix product.
        kernels: says whether leading axes are merged, and which devices share the
            kernel.
        split: the axis of the kernel that is split over `tensor` devices, see
            `mim_jax.sharding.RULES`.
        bias_init: initialiser of the bias.
        use_bias: whether there is a bias.
    """

    features: int
    dtype: str
    kernels: Kernels = PLAIN
    split: int | None = None
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    use_bias: bool = True

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b {self.features}"]:
        product, bias = self.product_and_bias(x)
        if bias is None:
            return product
        return product + bias.reshape((1,) * (product.ndim - 1) + bias.shape)

    @nn.compact
    def product_and_bias(
        self, x: Float[Array, "*b d"]
    ) -> tuple[Float[Array, "*b {self.features}"], Any]:
        """The product, without the bias added, and the bias "f" (None: no bias)."""
        init, shape = nn.initializers.xavier_uniform(), (x.shape[-1], self.features)
        kernel: Any = jnp.asarray(self.param("kernel", init, shape), self.dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,))
            bias = jnp.asarray(bias, self.dtype)
        if self.kernels.mesh is not None:
            kernel = gathered(kernel, self.kernels.mesh, self.split)
        x = x.astype(self.dtype)
        rows = x.reshape(-1, x.shape[-1]) if self.kernels.merge_rows else x
        return (rows @ kernel).reshape(*x.shape[:-1], self.features), bias


class Attention(nn.Module):
    """Multi-head self-attention; q, k and v come from one fused matrix.

    Attributes:
        weights: True: return the softmax weights too; False: None in their place.
    """

    heads: int
    dtype: str
    kernels: Kernels
    weights: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"]
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b a n n"] | None]:
        width = x.shape[-1]
        # Xavier on the fused [d, 3d] matrix has the bound sqrt(6 / 4d), sqrt(1/2) times
        # the bound of three separate matrices.
        fused = Dense(3 * width, self.dtype, self.kernels, split=1, name="qkv")
        qkv, bias = fused.product_and_bias(x)
        if self.weights or self.kernels.attention == "plain":
            mixed, weights = attention(qkv, bias, self.heads)
        else:
            mixed, weights = attend(qkv, bias, self.heads, self.kernels), None
        mixed = Dense(width, self.dtype, self.kernels, split=0, name="out")(mixed)
        return mixed, weights if self.weights else None


class Block(nn.Module):
    """Pre-norm transformer block: attention, then an MLP, each added to its input."""

    heads: int
    mlp_ratio: float
    dtype: str
    kernels: Kernels = PLAIN
    taps: tuple[str, ...] = ()

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], scales: Float[Array, "2 b"] | None = None
    ) -> tuple[Float[Array, "b n d"], dict[str, Float[Array, "..."]]]:
        width, hidden = x.shape[-1], int(x.shape[-1] * self.mlp_ratio)
        look = "attention" in self.taps
        attn = Attention(self.heads, self.dtype, self.kernels, look, name="attn")
        y, weights = attn(LayerNorm(self.dtype, name="ln1")(x))
        x = x + (y if scales is None else _scaled(y, scales[0]))
        y = LayerNorm(self.dtype, name="ln2")(x)
        y = gelu(Dense(hidden, self.dtype, self.kernels, split=1, name="fc1")(y))
        y = Dense(width, self.dtype, self.kernels, split=0, name="fc2")(y)
        x = x + (y if scales is None else _scaled(y, scales[1]))
        seen = {"blocks": x, "attention": weights}
        return x, {name: seen[name] for name in self.taps}


def _scaled(y, scale):
    return y * scale[:, None, None].astype(y.dtype)


class Encoder(nn.Module):
    """ViT encoder over any subset of patches, arXiv:2111.06377 and 2010.11929.

    Attributes:
        patch: side of a patch in pixels.
        width, depth, heads: token width, number of blocks, attention heads; see SIZES.
        mlp_ratio: hidden width of the MLP divided by the token width.
        positions: "fixed": sines and cosines. "learned": parameters that start from
            these, with a first row of zeros for the class token.
        norm: "tokens": the final norm is applied to each token. "pooled": it is applied
            to the mean of the patch tokens, and tokens are returned without it.
        drop_path: share of images for which training skips a branch of the last block;
            in earlier blocks the share is smaller, linearly in depth from 0.
        dtype: dtype of activations; parameters are float32.
        remat: what the backward pass recomputes, a key of REMAT.
        kernels: the form of each operation; the plan sets it.
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
    kernels: Kernels = internal(PLAIN)

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
        """Class token and patch tokens, after the final norm if norm="tokens".

        Args:
            patches: all standardised patches, in grid order.
            grid: the patch grid of the images; static.
            keep: indices of the patches to see; None: all patches.
            taps: names from TAPS: further values to return. "blocks": the tokens after
                each block, "l b t d" (before the final norm). "attention": the softmax
                weights of each block, "l b a t t".
            hidden: True where a learned mask token replaces the embedded patch. The
                parameter exists only if `init` was called with `hidden`.
            keys: one key per image, for drop path; None drops nothing.
        Returns:
            (tokens, taps) with t = 1 + k, the class token first. With norm="pooled" the
            taps also hold "pooled" "b d", the final norm of the mean patch token.
        Raises:
            ValueError: both keep and hidden are given.
        """
        first, table = self._positions(grid)
        positions = table[None]
        if keep is not None:
            # Patches are selected before they are embedded: hidden ones cost nothing.
            patches, positions = take(patches, keep), table[keep]
        # The reference embeds with a convolution, whose bias does not start at zero.
        bias = _uniform(patches.shape[-1] ** -0.5)
        x = Dense(self.width, self.dtype, self.kernels, None, bias, name="embed")(
            patches
        )
        if hidden is not None:
            x = self._with_mask_tokens(x, hidden, keep)
        x = x + positions.astype(x.dtype)
        cls = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, self.width))
        cls = jnp.broadcast_to((cls + first).astype(x.dtype), (len(x), 1, self.width))
        scales = None
        if keys is not None and self.drop_path > 0:
            scales = drop_path(keys, self.depth, self.drop_path)
        x, seen = run_blocks(self, jnp.concatenate([cls, x], axis=1), taps, scales)
        norm = LayerNorm(self.dtype, name="norm")
        if self.norm == "tokens":
            return norm(x), seen
        pooled = norm(x[:, 1:].mean(axis=1, keepdims=True))[:, 0]
        return x, seen | {"pooled": pooled}

    def _positions(
        self, grid: Grid
    ) -> tuple[Float[Array, "1 1 d"], Float[Array, "n d"]]:
        """Position of the class token, and positions of the grid's patch tokens."""
        table = sincos_2d(grid, self.width)
        if self.positions == "learned":
            return self._learned_positions(grid, table)
        return jnp.zeros((1, 1, self.width)), jnp.asarray(table, jnp.float32)

    def _learned_positions(self, grid: Grid, table: np.ndarray):
        def start(key, shape):
            del key
            whole = np.concatenate([np.zeros((1, shape[1])), table])
            return jnp.asarray(whole, jnp.float32)

        whole = jnp.asarray(self.param("pos_embed", start, (1 + grid.size, self.width)))
        return whole[None, :1], whole[1:]

    def _with_mask_tokens(self, x, hidden, keep):
        if keep is not None:
            raise ValueError("keep drops patches and hidden replaces them: want one")
        init = nn.initializers.normal(0.02)
        mask_token = self.param("mask_token", init, (1, 1, self.width))
        return jnp.where(hidden[:, :, None], mask_token.astype(x.dtype), x)

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


def _uniform(bound: float) -> nn.initializers.Initializer:
    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, minval=-bound, maxval=bound)

    return init
