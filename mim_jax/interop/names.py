# SPDX-License-Identifier: Apache-2.0
"""Names of parameters: ours, timm's, and how one array becomes the other.

Everybody's names are brought to those of timm first, which FAIR's programs share. A
`Layout` says which parameters a network has; `rows` lists them under both names, for
reading and for writing.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

Arrays = Sequence[np.ndarray]

# From names of transformers, versions 4 and 5, to those of timm, in this order.
_OF_TRANSFORMERS = (
    (r"^(vit|beit|deit|decoder)\.", ""),
    (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^decoder_(layers|encoder\.layer)\.", "decoder_blocks."),
    (r"^(encoder\.layer|layers)\.", "blocks."),
    (r"^(encoder\.relative_position_bias|shared_position_bias)\.", "rel_pos_bias."),
    (r"\.attention\.(attention\.)?(relative_position_bias\.)", r".attn.\2"),
    (r"\.attention\.attention\.(q|k|v)(uery|ey|alue)\.", r".attn.\1."),
    (r"\.attention\.(q|k|v)_proj\.", r".attn.\1."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.relative_position_bias\.", "."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.lambda_([12])$", r".gamma_\1"),
    (r"^layernorm\.", "norm."),
    (r"^pooler\.layernorm\.", "fc_norm."),
    (r"^classifier\.", "head."),
)
# And back, to those of version 4, which version 5 reads and writes too.
_TO_TRANSFORMERS = (
    (r"^(cls_token)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^decoder_blocks\.", "decoder_layers."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.q\.", ".attention.attention.query."),
    (r"\.attn\.k\.", ".attention.attention.key."),
    (r"\.attn\.v\.", ".attention.attention.value."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"^norm\.", "layernorm."),
    (r"^head\.", "classifier."),
)


def from_transformers(name: str) -> str:
    """A name of transformers as timm has it.

    Example:
        >>> from_transformers("vit.encoder.layer.3.attention.attention.key.bias")
        'blocks.3.attn.k.bias'
    """
    return _replaced(name, _OF_TRANSFORMERS)


def to_transformers(name: str) -> str:
    """A name of timm as version 4 of transformers has it, inside of `vit` or
    `decoder`."""
    return _replaced(name, _TO_TRANSFORMERS)


def _replaced(name: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Which parameters a network has, and how they are named.

    Attributes:
        depth, decoder: number of blocks of the encoder, and of the decoder (0: none).
        split: queries, keys and values have matrices of their own.
        bias: which of them have a bias.
        gains: the name of layer scales.
        pairs: relative positions: of all blocks together, or of each.
        positions: there is a position table.
        norm: the name of the last norm.
        mask_token: the encoder has one.
        head: a linear layer classifies.
    """

    depth: int
    decoder: int = 0
    split: bool = False
    bias: Literal["qkv", "qv"] = "qkv"
    gains: Literal["", "gamma_{}", "ls{}.gamma"] = ""
    pairs: Literal["", "shared", "each"] = ""
    positions: bool = True
    norm: Literal["norm", "fc_norm"] = "norm"
    mask_token: bool = False
    head: bool = False

    @classmethod
    def of(cls, names: set[str]) -> "Layout":
        """The layout of a network whose parameters have these names of timm."""

        def depth(part: str) -> int:
            found = (re.match(rf"{part}\.(\d{{1,4}})\.", name) for name in names)
            return 1 + max((int(one[1]) for one in found if one), default=-1)

        first, decoder = "blocks.0.", depth("decoder_blocks")
        table = "relative_position_bias_table"
        split = f"{first}attn.q.weight" in names
        values = ("attn.k.bias", "attn.q.bias") if split else ("", "attn.q_bias")
        lacks_one = first + values[0] not in names and first + values[1] in names
        gains: tuple = ("gamma_{}", "ls{}.gamma")
        return cls(
            depth=depth("blocks"),
            decoder=decoder,
            split=split,
            bias="qv" if lacks_one else "qkv",
            gains=next((one for one in gains if first + one.format(1) in names), ""),
            pairs=(
                "shared"
                if f"rel_pos_bias.{table}" in names
                else "each"
                if f"{first}attn.{table}" in names
                else ""
            ),
            positions="pos_embed" in names,
            norm="fc_norm" if "fc_norm.weight" in names else "norm",
            mask_token="mask_token" in names and not decoder,
            head="head.weight" in names,
        )


class Row(NamedTuple):
    """A parameter under both names.

    Attributes:
        ours: its path.
        theirs: names of the arrays that it is made of.
        how: what it is, a key of HOW.
    """

    ours: str
    theirs: tuple[str, ...]
    how: str


def rows(layout: Layout) -> list[Row]:
    """All parameters of a network."""
    found = [Row("encoder/cls_token", ("cls_token",), "same")]
    if layout.positions:
        found.append(Row("encoder/pos_embed", ("pos_embed",), "table"))
    if layout.mask_token:
        found.append(Row("encoder/mask_token", ("mask_token",), "same"))
    table = "relative_position_bias_table"
    if layout.pairs:
        names = [f"blocks.{i}.attn.{table}" for i in range(layout.depth)]
        if layout.pairs == "shared":
            names = [f"rel_pos_bias.{table}"] * layout.depth
        found.append(Row("encoder/relative_positions", tuple(names), "stack"))
    found += _layer("encoder/embed", "patch_embed.proj", "patches")
    found += _blocks("encoder", "blocks", layout, layout.depth)
    found += _layer("encoder/norm", layout.norm, "norm")
    if layout.decoder:
        found.append(Row("decoder/mask_token", ("mask_token",), "same"))
        found.append(Row("decoder/pos_embed", ("decoder_pos_embed",), "table"))
        found += _layer("decoder/embed", "decoder_embed", "dense")
        found += _blocks("decoder", "decoder_blocks", layout, layout.decoder)
        found += _layer("decoder/norm", "decoder_norm", "norm")
        found += _layer("decoder/predict", "decoder_pred", "dense")
    if layout.head:
        found += _layer("head/linear", "head", "dense")
    return found


def _layer(ours: str, theirs: str, how: str) -> list[Row]:
    kernel = Row(f"{ours}/kernel", (f"{theirs}.weight",), how)
    if how == "norm":
        kernel = Row(f"{ours}/scale", (f"{theirs}.weight",), "same")
    return [kernel, Row(f"{ours}/bias", (f"{theirs}.bias",), "same")]


def _blocks(ours: str, theirs: str, layout: Layout, depth: int) -> list[Row]:
    found = []
    for i in range(depth):
        mine, other = f"{ours}/block{i:02d}", f"{theirs}.{i}"
        for name, their_name, how in (
            ("ln1", "norm1", "norm"),
            ("attn/out", "attn.proj", "dense"),
            ("ln2", "norm2", "norm"),
            ("fc1", "mlp.fc1", "dense"),
            ("fc2", "mlp.fc2", "dense"),
        ):
            found += _layer(f"{mine}/{name}", f"{other}.{their_name}", how)
        attention = f"{other}.attn"
        weights, biases = (f"{attention}.qkv.weight",), (f"{attention}.qkv.bias",)
        if layout.split:
            weights = tuple(f"{attention}.{x}.weight" for x in "qkv")
            biases = tuple(f"{attention}.{x}.bias" for x in layout.bias)
        elif layout.bias == "qv":
            biases = (f"{attention}.q_bias", f"{attention}.v_bias")
        how = "joined" if layout.bias == "qkv" else "without_keys"
        found.append(Row(f"{mine}/attn/qkv/kernel", weights, "dense"))
        found.append(Row(f"{mine}/attn/qkv/bias", biases, how))
        if layout.gains:
            for n in (1, 2):
                name = f"{other}.{layout.gains.format(n)}"
                found.append(Row(f"{mine}/scale{n}", (name,), "same"))
    return found


class How(NamedTuple):
    """How arrays of other programs become one of ours, and back; no number changes.

    Attributes:
        take: ours, of theirs.
        give: theirs, of ours; also gets their number, and the side of a patch.
    """

    take: Callable[[Arrays], np.ndarray]
    give: Callable[[np.ndarray, int, int], Arrays]


def _to_patches(arrays: Arrays) -> np.ndarray:
    (kernel,) = arrays  # "d c p q", and ours has rows, columns, channels in this order
    return kernel.transpose(2, 3, 1, 0).reshape(-1, kernel.shape[0])


def _of_patches(kernel: np.ndarray, count: int, patch: int) -> Arrays:
    del count
    whole = kernel.reshape(patch, patch, -1, kernel.shape[-1])
    return [whole.transpose(3, 2, 0, 1)]


def _without_keys(bias: np.ndarray, count: int, patch: int) -> Arrays:
    del count, patch
    queries, keys, values = np.split(bias, 3)
    if keys.any():
        raise ValueError("a bias of keys is not 0, and the format has none")
    return [queries, values]


HOW = {
    "same": How(lambda arrays: arrays[0], lambda ours, *_: [ours]),
    "dense": How(
        lambda arrays: np.concatenate(arrays).T,
        lambda ours, count, _: np.split(ours.T, count),
    ),
    "joined": How(np.concatenate, lambda ours, count, _: np.split(ours, count)),
    "without_keys": How(
        lambda arrays: np.concatenate([arrays[0], np.zeros_like(arrays[0]), arrays[1]]),
        _without_keys,
    ),
    "patches": How(_to_patches, _of_patches),
    "table": How(lambda arrays: arrays[0][0], lambda ours, *_: [ours[None]]),
    "stack": How(np.stack, lambda ours, *_: list(ours)),
}
