# SPDX-License-Identifier: Apache-2.0
"""Whose weights they are: recognised from the names of the parameters."""

import re
from typing import Literal, NamedTuple

from mim_jax.interop.names import from_transformers
from mim_jax.interop.reading import Source, Tensor, printable
from mim_jax.schema import ConfigError


class Family(NamedTuple):
    """A way to save vision transformers.

    Attributes:
        title: for people.
        marks: patterns, each of which must match a name.
        prefix: a pattern of what names of the network begin with; the entries without
            it are left.
        left: a pattern of entries that are left, names as timm has them.
        pool: what its authors take as the feature of an image, if nothing classifies.
    """

    title: str
    marks: tuple[str, ...]
    prefix: str = ""
    left: str = r"$^"
    pool: Literal["cls", "avg"] = "cls"


# The first that fits is taken. To add one, add its row, and to `names.py` what its
# names become.
FAMILIES: dict[str, Family] = {
    "mocov3": Family(
        "MoCo v3",
        (r"^(module\.)?base_encoder\.cls_token$",),
        prefix=r"(module\.)?base_encoder\.",
        left=r"head\.",
    ),
    "dino": Family(
        "DINO, teacher",
        (r"^(module\.)?backbone\.cls_token$",),
        prefix=r"(module\.)?backbone\.",
    ),
    "cae": Family(
        "CAE",
        (r"^encoder\.cls_token$", r"^encoder\.blocks\.0\.attn\.qkv\.weight$"),
        prefix=r"encoder\.",
        pool="avg",
    ),
    "hf_mae": Family(
        "MAE of transformers",
        (r"embeddings\.cls_token$", r"^decoder\.decoder_embed\.weight$"),
    ),
    "hf_beit": Family(
        "BEiT of transformers",
        (r"embeddings\.cls_token$", r"\.lambda_1$"),
        left=r"lm_head\.|pooler\.dense\.|.*relative_position_index$",
        pool="avg",
    ),
    "hf": Family(
        "ViT of transformers",
        (r"embeddings\.cls_token$",),
        left=r"pooler\.dense\.|mask_token$|decoder\.",
    ),
    "mae": Family("MAE with its decoder", (r"^(module\.)?decoder_embed\.weight$",)),
    "beit": Family(
        "BEiT",
        (r"^(module\.)?cls_token$", r"\.gamma_1$"),
        left=r"lm_head\.|.*relative_position_index$",
        pool="avg",
    ),
    "vit": Family(
        "ViT with the names of timm (MAE, DINO, DeiT, MoCo v3 as converted)",
        (r"^(module\.)?cls_token$",),
    ),
}


def recognised(source: Source) -> tuple[str, dict[str, Tensor], list[str]]:
    """The family of a source.

    Returns:
        (name of the family, arrays by the names that timm gives them, names of entries
        that are left out).
    Raises:
        ConfigError: it is no family that is known.
    """
    for name, family in FAMILIES.items():
        if not all(
            any(re.search(mark, one) for one in source.tensors) for mark in family.marks
        ):
            continue
        found, left = {}, []
        for given, tensor in source.tensors.items():
            inner = re.sub(family.prefix or r"^module\.", "", given, count=1)
            if family.prefix and not re.match(family.prefix, given):
                left.append(given)
                continue
            inner = from_transformers(inner) if name.startswith("hf") else inner
            if re.match(family.left, inner):
                left.append(given)
            elif inner in found:
                raise ConfigError(
                    f"{source.name} has {printable(given)} and another {inner}: it is "
                    "no network that is known"
                )
            else:
                found[inner] = tensor
        return name, found, left
    some = ", ".join(printable(one) for one in sorted(source.tensors)[:8])
    raise ConfigError(
        f"{source.name} is no vision transformer that is known: it has "
        f"{len(source.tensors)} arrays{f', such as {some}' if some else ''}; want "
        + ", ".join(family.title for family in FAMILIES.values())
    )
