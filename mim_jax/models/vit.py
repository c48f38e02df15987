# SPDX-License-Identifier: Apache-2.0
"""Vision transformer that sees a chosen subset of patches; details are those of MAE.

Parameter names are public, since checkpoints depend on them. Each block has its own,
e.g. `block00/attn/qkv/kernel`. If the parameters of all blocks are stacked under
`blocks` (see `mim_jax.state.stack_blocks`), the network runs its blocks as one loop.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from mim_jax.kernels import attend
from mim_jax.kernels.base import PLAIN, Kernels
from mim_jax.kernels.spread import gathered
from mim_jax.ops.attention import accurate, attention, repeated
from mim_jax.ops.masking import take
from mim_jax.ops.patches import Grid, sincos_2d
from mim_jax.ops.posembed import relative_pairs
from mim_jax.schema import check_ranges, internal, shared, within

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

# Of one block: factors of its two branches, and what is added to attention's logits.
Scales = Float[Array, "2 b"] | None
Offsets = Float[Array, "#b a n n"] | None


class Windows(NamedTuple):
    """Attention within squares of patches, arXiv:2203.16527, section 3.

    Attributes:
        side: of a square, in patches; it divides both sides of the grid.
        whole: numbers of the blocks that attend everywhere. In the others the class
            token, which lies in no square, stays as it is.
        grid: of the patches.
    """

    side: int
    whole: tuple[int, ...]
    grid: Grid

    def split(self, x: Float[Array, "b n d"]) -> Float[Array, "w m d"]:
        """The patch tokens of each square, square by square."""
        rows, cols = self.grid.rows // self.side, self.grid.cols // self.side
        x = x.reshape(len(x), rows, self.side, cols, self.side, -1)
        return jnp.swapaxes(x, 2, 3).reshape(-1, self.side**2, x.shape[-1])

    def join(self, x: Float[Array, "w m d"]) -> Float[Array, "b n d"]:
        """The inverse of `split`."""
        rows, cols = self.grid.rows // self.side, self.grid.cols // self.side
        x = x.reshape(-1, rows, cols, self.side, self.side, x.shape[-1])
        return jnp.swapaxes(x, 2, 3).reshape(-1, self.grid.size, x.shape[-1])

    def run_blocks(
        self,
        network: Any,
        x: Float[Array, "b n d"],
        taps: Sequence[str] = (),
        each: Sequence[Float[Array, "l ..."] | None] = (),
    ) -> tuple[Float[Array, "b n d"], dict[str, Float[Array, "l ..."]]]:
        """As the function `run_blocks`, but most blocks see one square at a time.

        Raises:
            ValueError: the blocks are one loop, or positions are relative, or weights
                of attention are asked for.
        """
        if network.has_variable("params", "blocks") or "attention" in taps:
            raise ValueError(
                "windows: blocks differ, and so do their weights of attention; want "
                "config.scan=False and no tap 'attention'"
            )
        remat = network.remat
        cls = Block if remat == "none" else _rematerialised(remat, stacked=False)
        given = {name: getattr(network, name) for name in _OF_A_BLOCK}
        seen = []
        for i in range(network.depth):
            block = cls(name=f"block{i:02d}", taps=tuple(taps), **given)
            own = [None if one is None else one[i] for one in each]
            x, tap = block(x, *own) if i in self.whole else self._run(block, x, *own)
            seen.append(tap)
        return x, {name: jnp.stack([tap[name] for tap in seen]) for name in taps}

    def _run(self, block: Any, x: Float[Array, "b t d"], scales: Scales, offsets: Any):
        """What a block returns that sees one square at a time."""
        if offsets is not None:
            raise ValueError(
                "relative_positions=True with windows: want relative_positions=False"
            )
        patches = self.split(x[:, 1:])
        if scales is not None:
            scales = jnp.repeat(scales, len(patches) // len(x), axis=1)
        patches, _ = block(patches, scales, None)
        x = jnp.concatenate([x[:, :1], self.join(patches)], axis=1)
        return x, {"blocks": x}


def run_blocks(
    network: Any,
    x: Float[Array, "b n d"],
    taps: Sequence[str] = (),
    each: Sequence[Float[Array, "l ..."] | None] = (),
) -> tuple[Float[Array, "b n d"], dict[str, Float[Array, "l ..."]]]:
    """The blocks of an Encoder or Decoder, one after the other.

    Args:
        network: the calling module; the blocks become its sub-modules.
        taps: names from TAPS: further values to return, with a leading axis over the
            blocks.
        each: the further arguments of a block, each with a leading axis over the
            blocks, or None.
    """
    fields = {name: getattr(network, name) for name in _OF_A_BLOCK}
    fields["taps"] = tuple(taps)
    cls, stacked = Block, network.has_variable("params", "blocks")
    if network.remat != "none":
        cls = _rematerialised(network.remat, stacked)
    if stacked:
        return _scanned(cls, network.depth, fields, x, each)
    seen = []
    for i in range(network.depth):
        own = [None if one is None else one[i] for one in each]
        x, tap = cls(name=f"block{i:02d}", **fields)(x, *own)
        seen.append(tap)
    return x, {name: jnp.stack([tap[name] for tap in seen]) for name in taps}


_OF_A_BLOCK = ("heads", "mlp_ratio", "epsilon", "layer_scale", "dtype", "kernels")


def _rematerialised(remat: str, stacked: bool):
    """A block that saves what REMAT[remat] says and recomputes the rest in the backward
    pass."""
    # Outside a loop the compiler would merge the recomputation with the original.
    return nn.remat(Block, policy=REMAT[remat], prevent_cse=not stacked)


def _scanned(cls, depth: int, fields: dict[str, Any], x, each):
    """The blocks as one loop over stacked parameters."""
    axes: dict[str, Any] = dict(
        variable_axes={"params": 0}, split_rngs={"params": False}
    )
    blocks = nn.scan(cls, length=depth, **axes)(name="blocks", **fields)
    return blocks(x, *each)


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


def check_width(name: str, width: int, heads: int, mlp_ratio: float) -> None:
    """ValueError unless the width is a multiple of the heads, and of 4 for the position
    tables, and the MLP has a width, too."""
    if width % heads or width % 4:
        raise ValueError(
            f"{name}.width={width}, {name}.heads={heads}: want a width that is a "
            "multiple of the number of heads and of 4"
        )
    if int(width * mlp_ratio) < 1:
        raise ValueError(
            f"{name}.mlp_ratio={mlp_ratio} of {name}.width={width}: want an MLP of at "
            "least 1 number"
        )


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x Phi(x), exact, in float32 at least, arXiv:1606.08415.

    It uses erf, as PyTorch does; JAX's own gelu uses erfc, which is slower everywhere.
    """
    wide = x.astype(accurate(x.dtype))
    return (0.5 * wide * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm, by default with MAE's epsilon, in float32 at least.

    Flax's layer norm mixes dtypes by implicit promotion, which our tests forbid.
    """

    dtype: str
    epsilon: float = 1e-6

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
        wide = (wide - mean) * jax.lax.rsqrt(variance + self.epsilon)
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
        return product if bias is None else product + repeated(bias, product)

    @nn.compact
    def product_and_bias(
        self, x: Float[Array, "*b d"]
    ) -> tuple[Float[Array, "*b {self.features}"], Any]:
        """The product, without the bias added, and the bias "f", float32 (None: no
        bias)."""
        init, shape = nn.initializers.xavier_uniform(), (x.shape[-1], self.features)
        kernel: Any = jnp.asarray(self.param("kernel", init, shape), self.dtype)
        bias = None
        if self.use_bias:
            bias = jnp.asarray(self.param("bias", self.bias_init, (self.features,)))
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
        self, x: Float[Array, "b n d"], offsets: Offsets = None
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b a n n"] | None]:
        width = x.shape[-1]
        # Xavier on the fused [d, 3d] matrix has the bound sqrt(6 / 4d), sqrt(1/2) times
        # the bound of three separate matrices.
        fused = Dense(3 * width, self.dtype, self.kernels, split=1, name="qkv")
        qkv, bias = fused.product_and_bias(x)
        if self.weights or self.kernels.attention == "plain":
            mixed, weights = attention(qkv, bias, self.heads, offsets)
        else:
            mixed, weights = attend(qkv, bias, self.heads, self.kernels), None
        mixed = Dense(width, self.dtype, self.kernels, split=0, name="out")(mixed)
        return mixed, weights if self.weights else None


class Block(nn.Module):
    """Pre-norm transformer block: attention, then an MLP, each added to its input."""

    heads: int
    mlp_ratio: float
    epsilon: float
    layer_scale: float | None
    dtype: str
    kernels: Kernels = PLAIN
    taps: tuple[str, ...] = ()

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], scales: Scales = None, offsets: Offsets = None
    ) -> tuple[Float[Array, "b n d"], dict[str, Float[Array, "..."]]]:
        width, hidden = x.shape[-1], int(x.shape[-1] * self.mlp_ratio)
        look = "attention" in self.taps
        attn = Attention(self.heads, self.dtype, self.kernels, look, name="attn")
        y, weights = attn(LayerNorm(self.dtype, self.epsilon, name="ln1")(x), offsets)
        plain = scales is None and self.layer_scale is None
        x = x + (y if plain else self._scaled(y, scales, 0))
        y = LayerNorm(self.dtype, self.epsilon, name="ln2")(x)
        y = gelu(Dense(hidden, self.dtype, self.kernels, split=1, name="fc1")(y))
        y = Dense(width, self.dtype, self.kernels, split=0, name="fc2")(y)
        x = x + (y if plain else self._scaled(y, scales, 1))
        seen = {"blocks": x, "attention": weights}
        return x, {name: seen[name] for name in self.taps}

    def _scaled(self, y, scales, branch: int):
        """A branch times its layer scale and its factor from `drop_path`."""
        if self.layer_scale is not None:
            start = nn.initializers.constant(self.layer_scale)
            gains = self.param(f"scale{branch + 1}", start, y.shape[-1:])
            y = y * repeated(gains, y)
        if scales is None:
            return y
        wide = y.astype(accurate(y.dtype)) * scales[branch][:, None, None]
        return wide.astype(y.dtype)  # a rounded factor would not be 1 on average


def positions(
    network: Any, grid: Grid
) -> tuple[Float[Array, "1 1 d"], Float[Array, "n d"]]:
    """Position of the class token, and those of the grid's patch tokens, of an Encoder
    or Decoder."""
    table = sincos_2d(grid, network.width)
    if network.positions != "fixed":
        return _own_positions(network, table)
    return jnp.zeros((1, 1, network.width)), jnp.asarray(table, jnp.float32)


def _own_positions(network: Any, table: np.ndarray):
    """The positions of a network that has none, or learns them."""
    whole = np.concatenate([np.zeros((1, network.width)), table])
    if network.positions == "none":
        whole = jnp.zeros(whole.shape)
    else:
        start = jnp.asarray(whole, jnp.float32)
        whole = jnp.asarray(network.param("pos_embed", lambda _: start))
    return whole[None, :1], whole[1:]


class Encoder(nn.Module):
    """ViT encoder over any subset of patches, arXiv:2111.06377 and 2010.11929.

    Attributes:
        patch: side of a patch in pixels.
        width, depth, heads: token width, number of blocks, attention heads; see SIZES.
        mlp_ratio: hidden width of the MLP divided by the token width.
        positions: "fixed": sines and cosines. "learned": parameters that start from
            these, with a first row of zeros for the class token. "none": no positions.
        relative_positions: each block adds a learned bias to its attention, by how far
            two patches lie apart, as BEiT does, arXiv:2106.08254; it starts from 0.
            Such attention has the plain form only.
        layer_scale: each branch of a block is multiplied by learned factors that start
            from this number, arXiv:2103.17239; None: it is not.
        epsilon: what layer norms add to the variance.
        norm: "tokens": the final norm is applied to each token. "pooled": it is applied
            to the mean of the patch tokens, and tokens are returned without it.
        drop_path: share of images for which training skips a branch of the last block;
            in earlier blocks the share is smaller, linearly in depth from 0.
        dtype: dtype of activations; parameters are float32.
        remat: what the backward pass recomputes, a key of REMAT.
        kernels: the form of each operation; the plan sets it.
    """

    patch: int = within(16, least=1, most=4096)
    width: int = within(768, least=4, most=2**17)
    depth: int = within(12, least=1, most=1000)
    heads: int = within(12, least=1, most=2**15)
    mlp_ratio: float = within(4.0, least=0.01, most=1000)
    positions: Literal["fixed", "learned", "none"] = "fixed"
    relative_positions: bool = False
    layer_scale: float | None = within(None, above=0, most=10)
    epsilon: float = within(1e-6, above=0, most=0.1)
    norm: Literal["tokens", "pooled"] = "tokens"
    drop_path: float = within(0.0, least=0, below=1)
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
        through: Callable = run_blocks,
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
            through: what passes the tokens through the blocks; `Windows.run_blocks`
                lets most blocks attend within squares, and wants all patches.
        Returns:
            (tokens, taps) with t = 1 + k, the class token first. With norm="pooled" the
            taps also hold "pooled" "b d", the final norm of the mean patch token.
        Raises:
            ValueError: both keep and hidden are given.
        """
        first, table = positions(self, grid)
        patches = patches if keep is None else take(patches, keep)
        # The reference embeds with a convolution, whose bias does not start at zero.
        bias = _uniform(patches.shape[-1] ** -0.5)
        embed = Dense(self.width, self.dtype, self.kernels, None, bias, name="embed")
        x = embed(patches)  # hidden patches, left out already, cost nothing
        if hidden is not None:
            x = self._with_mask_tokens(x, hidden, keep)
        x = x + repeated(table if keep is None else table[keep], x)
        cls = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, self.width))
        cls = repeated(cls + first, x[:, :1])
        keys = keys if self.drop_path else None
        scales = None if keys is None else drop_path(keys, self.depth, self.drop_path)
        offsets = self._offsets(grid, keep) if self.relative_positions else None
        x, seen = through(self, jnp.concatenate([cls, x], 1), taps, (scales, offsets))
        norm = LayerNorm(self.dtype, self.epsilon, name="norm")
        if self.norm == "tokens":
            return norm(x), seen
        return x, seen | {"pooled": norm(mean_token(x[:, 1:]))[:, 0]}

    def _offsets(self, grid: Grid, keep) -> Float[Array, "l _ a t t"]:
        """The relative position bias of each block, for the tokens that it sees."""
        pairs, count = relative_pairs(grid)
        shape = (self.depth, count, self.heads)
        start = nn.initializers.zeros
        table = jnp.asarray(self.param("relative_positions", start, shape))
        pairs = jnp.asarray(pairs)[None]
        if keep is not None:
            seen = jnp.pad(1 + keep, [(0, 0), (1, 0)])  # the class token is the first
            pairs = pairs[0][seen[:, :, None], seen[:, None, :]]
        return jnp.moveaxis(table[:, pairs], -1, 2)

    def _with_mask_tokens(self, x, hidden, keep):
        if keep is not None:
            raise ValueError("keep drops patches and hidden replaces them: want one")
        init = nn.initializers.normal(0.02)
        mask_token = self.param("mask_token", init, (1, 1, self.width))
        return jnp.where(hidden[:, :, None], repeated(mask_token, x), x)

    def check_sizes(self) -> None:
        """ValueError if the sizes do not fit together."""
        check_ranges(self, "encoder.")
        check_width("encoder", self.width, self.heads, self.mlp_ratio)

    def flops(self, visible: int, channels: int) -> float:
        """FLOPs of one forward pass of one image with `visible` patches."""
        embed = 2 * visible * self.patch**2 * channels * self.width
        layer = layer_flops(visible + 1, self.width, self.mlp_ratio)
        return embed + self.depth * layer


def mean_token(tokens: Float[Array, "b n d"]) -> Float[Array, "b 1 d"]:
    """The mean of an image's tokens, float32 at least: it has more digits than tokens
    in bfloat16 have."""
    return tokens.astype(accurate(tokens.dtype)).mean(axis=1, keepdims=True)


def _uniform(bound: float) -> nn.initializers.Initializer:
    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, minval=-bound, maxval=bound)

    return init
