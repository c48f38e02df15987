# SPDX-License-Identifier: Apache-2.0
"""Weights of other programs as a network of ours: its config and its parameters."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from mim_jax import config as configs
from mim_jax import state as states
from mim_jax.interop import names
from mim_jax.interop.families import FAMILIES, recognised
from mim_jax.interop.names import HOW, Layout
from mim_jax.interop.reading import Source, Tensor, printable
from mim_jax.maskings.base import Masking
from mim_jax.models.vit import SIZES
from mim_jax.schema import ConfigError

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_LARGEST = 2**14  # pixels, as config.data.image_size has it
# Heads by width, for the sizes that have names; of others, a head is 64 wide.
_HEADS = {one["width"]: one["heads"] for one in SIZES.values()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Said:
    """What the user says of weights, where the files do not; None or "": nothing.

    Attributes:
        heads, decoder_heads: number of attention heads.
        source: name of the source of the run's images.
        path: where these are.
    """

    heads: int | None = None
    decoder_heads: int | None = None
    source: str = "tfds"
    path: str = ""


@dataclasses.dataclass(frozen=True)
class Converted:
    """Weights as ours.

    Attributes:
        family: whose they are, for people.
        config: of a run with this network.
        params: by path, float32.
        notes: lines for people: what was taken, assumed and left.
    """

    family: str
    config: configs.Tree
    params: dict[str, np.ndarray]
    notes: tuple[str, ...]


def convert(source: Source, said: Said = Said()) -> Converted:
    """The network of a source.

    Raises:
        ConfigError: the family is unknown, or entries are missing, are too many or have
            the wrong shape; all of them are listed.
    """
    name, tensors, left = recognised(source)
    layout = Layout.of(set(tensors))
    facts = _Facts(source, tensors, layout, said)
    config = facts.config(FAMILIES[name].pool)
    try:
        objective = configs.build_objective(config)
        for network in (objective.encoder, getattr(objective, "decoder", None)):
            if network is not None:
                network.check_sizes()
        size, channels = tuple(config.data.image_size), len(config.objective.mean)
        shapes = jax.eval_shape(
            lambda: states.initial(objective, seed=0, image_shape=(*size, channels))[0]
        )
    except ValueError as error:
        raise ConfigError(f"{source.name}: {error}") from error
    wanted = traverse_util.flatten_dict(shapes, sep="/")
    rows = names.rows(layout)
    _check(source.name, tensors, wanted, rows, facts.patch)
    params = {}
    for row in rows:
        try:
            arrays = [np.asarray(tensors[one].read(), np.float32) for one in row.theirs]
        except Exception as error:  # of whatever reads it: a damaged file, odd numbers
            raise ConfigError(
                f"{source.name}: {', '.join(row.theirs)} cannot be read "
                f"({type(error).__name__}: {error}): want a whole file; fetch it again"
            ) from error
        ours = HOW[row.how].take(arrays)
        if not np.isfinite(ours).all():
            raise ConfigError(f"{source.name}: {', '.join(row.theirs)}: not finite")
        params[row.ours] = np.ascontiguousarray(ours)
    notes = (*facts.notes, *([f"not taken: {_listed(left)}"] if left else []))
    return Converted(FAMILIES[name].title, config, params, notes)


def _check(
    name: str,
    tensors: dict[str, Tensor],
    wanted: dict[str, Any],
    rows: list[names.Row],
    patch: int,
) -> None:
    """ConfigError, which lists all, unless the entries are those of the network."""
    missing, misshaped = [], []
    for row in rows:
        # An array without memory, which has the shapes of all that it is made of.
        ours = np.broadcast_to(np.float32(0), wanted[row.ours].shape)
        want = [one.shape for one in HOW[row.how].give(ours, len(row.theirs), patch)]
        for one, shape in zip(row.theirs, want, strict=True):
            if one not in tensors:
                missing.append(f"{one} {list(shape)}")
            elif tensors[one].shape != shape:
                found = list(tensors[one].shape)
                misshaped.append(f"{one} {found}, want {list(shape)}")
    known = {one for row in rows for one in row.theirs}
    extra = [
        f"{printable(one)} {[*tensors[one].shape]}" for one in tensors.keys() - known
    ]
    lines = [
        f"{len(found)} {word}:\n    " + "\n    ".join(sorted(set(found)))
        for word, found in (
            ("missing", missing),
            ("of the wrong shape", misshaped),
            ("that this network has no place for", extra),
        )
        if found
    ]
    if lines:
        raise ConfigError(
            f"{name} is no whole network of this kind (names as timm has them):\n  "
            + "\n  ".join(lines)
        )


class _Facts:
    """What is known of a network, and where from.

    Attributes:
        patch: side of a patch.
        notes: lines for people.
    """

    def __init__(
        self, source: Source, tensors: dict[str, Tensor], layout: Layout, said: Said
    ):
        self._source, self._tensors, self._layout = source, tensors, layout
        self._said, self.notes = said, []
        if not 0 < layout.depth <= 1000:
            raise ConfigError(f"{source.name} has no blocks.0: want a whole network")
        if (act := self._told("hidden_act")) not in (None, "gelu"):
            raise ConfigError(f"{source.name} has hidden_act={act!r}: want 'gelu'")
        self.width, self.channels, self.patch, side = self._shape(
            "patch_embed.proj.weight", 4
        )
        if self.patch != side:
            raise ConfigError(
                f"{source.name} has patches of {self.patch} x {side} pixels: want "
                "square ones"
            )
        classes = self._shape("head.weight", 2)[0] if layout.head else None
        self.classes = classes

    def config(self, pool: str) -> configs.Tree:
        """The config of a run with this network."""
        layout = self._layout
        kind = "encoder"
        if layout.decoder:
            kind = "mae"
        elif layout.head:
            kind = "supervised"
        tree = configs.experiment("train", objective=kind, source=self._said.source)
        tree.dtype, tree.scan, tree.remat = "float32", False, "none"
        tree.data.image_size = self._image_size()
        self._place(tree.data.source)
        self._check_channels(tree)
        objective = tree.objective
        objective.mean, objective.std = self._statistics()
        relative = self._shape(self._pairs, 2)[1] if layout.pairs else None
        heads = relative or self._heads(
            self._said.heads, self.width, "num_attention_heads"
        )
        objective.encoder.update(
            self._sizes("blocks", self.width, layout.depth, heads)
            | dict(
                patch=self.patch,
                positions="learned" if layout.positions else "none",
                relative_positions=bool(layout.pairs),
            )
        )
        if layout.gains:
            objective.encoder.layer_scale = 0.1  # only that of a new network
        averaged = layout.norm == "fc_norm"
        if kind == "supervised":
            objective.classes = self.classes
            objective.pool = "avg" if averaged else "cls"
        if kind != "mae":
            objective.encoder.norm = "pooled" if averaged else "tokens"
        if kind == "encoder":
            objective.pool = "avg" if averaged else pool
            objective.hide = "mask_token" if layout.mask_token else "drop"
        if kind == "mae":
            self._decoder(objective)
        self.notes.insert(
            0,
            f"network: {layout.depth} blocks, {self.width} wide, {heads} heads, "
            f"patches of {self.patch}, images of "
            + " x ".join(map(str, tree.data.image_size)),
        )
        return tree

    def _decoder(self, objective: configs.Tree) -> None:
        width = self._shape("decoder_embed.weight", 2)[0]
        heads = self._said.decoder_heads
        heads = heads or self._told("decoder_num_attention_heads")
        if heads is None:
            heads = max(1, width // 32)
            self.notes.append(
                f"decoder: {heads} heads, 32 wide as MAE's are; --decoder-heads=N says "
                "otherwise"
            )
        depth = self._layout.decoder
        objective.decoder.update(
            self._sizes("decoder_blocks", width, depth, heads)
            | dict(positions="learned")
        )
        told = self._told("norm_pix_loss")
        objective.normalise_target = True if told is None else bool(told)
        if told is None:
            self.notes.append(
                "target: normalised patches, since nothing says otherwise"
            )
        ratio, unit = self._told("mask_ratio"), self._told("mask_downsampling")
        objective.masking = configs.choose(Masking, "random")
        if isinstance(ratio, float) and 0 < ratio < 1:
            objective.masking.ratio = ratio
        if isinstance(unit, int) and unit > 1:
            objective.masking.unit = unit * self.patch
            objective.masking.partial_units = "allow"

    def _sizes(self, part: str, width: int, depth: int, heads: int) -> dict[str, Any]:
        hidden = self._shape(f"{part}.0.mlp.fc1.weight", 2)[0]
        ratio = hidden / width
        if int(width * ratio) != hidden:  # by rounding
            ratio = (hidden + 0.5) / width
        epsilon = self._source.about.get("layer_norm_eps", 1e-6)
        (epsilon,) = self._numbers("layer_norm_eps", [epsilon])
        return dict(
            width=width,
            depth=depth,
            heads=heads,
            mlp_ratio=ratio,
            epsilon=epsilon,
        )

    def _heads(self, said: int | None, width: int, key: str) -> int:
        if said:
            return said
        # The second is where timm's folders have it.
        for told in (self._told(key), self._of_timm("model_args").get("num_heads")):
            if isinstance(told, int):
                return told
        if "vit_small" in str(self._told("arch")) and "base_encoder" in self._first:
            return 12  # of MoCo v3's own ViT-S
        heads = _HEADS.get(width, width // 64 if width % 64 == 0 else None)
        if heads is None:
            raise ConfigError(
                f"{self._source.name}: nothing says how many heads a network of width "
                f"{width} has: want --heads=N"
            )
        self.notes.append(
            f"encoder: {heads} heads, as usual at this width; --heads=N says otherwise"
        )
        return heads

    def _image_size(self) -> tuple[int, int]:
        given = self._source.about.get("image_size")
        if isinstance(given, list | tuple) and len(given) == 2:
            rows, cols = map(int, self._numbers("image_size", given))
            self._check_image_size(rows, cols)
            return rows, cols
        if self._layout.positions:
            count = self._shape("pos_embed", 3)[1] - 1
        elif self._layout.pairs:
            far = math.isqrt(max(self._shape(self._pairs, 2)[0] - 3, 0))
            count = ((far + 1) // 2) ** 2
        else:
            raise ConfigError(
                f"{self._source.name} has no positions: want pos_embed, or relative "
                "positions"
            )
        side = math.isqrt(max(count, 0))
        if side**2 != count or not side:
            raise ConfigError(
                f"{self._source.name} has positions for {count} patches, which is no "
                "square: want a folder whose config.json has image_size"
            )
        return (side * self.patch, side * self.patch)

    def _check_image_size(self, rows: int, cols: int) -> None:
        """ConfigError unless the positions that the file holds are those of such
        images: the size is a claim, and tables are made by it."""
        high, wide = rows // self.patch, cols // self.patch
        found = count = high * wide
        if self._layout.positions:
            found = self._shape("pos_embed", 3)[1] - 1
        elif self._layout.pairs:
            found = self._shape(self._pairs, 2)[0] - 3
            count = (2 * high - 1) * (2 * wide - 1)
        if min(high, wide) < 1 or max(rows, cols) > _LARGEST or found != count:
            raise ConfigError(
                f"{self._source.name} has image_size={[rows, cols]}, which is {count} "
                f"positions, and holds {found}: want a size of {self.patch} to "
                f"{_LARGEST} pixels whose patches they are for"
            )

    def _statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation that images are standardised with."""
        images = self._source.images or self._of_timm("pretrained_cfg")
        for keys in (("image_mean", "image_std"), ("mean", "std")):
            if all(isinstance(images.get(key), list | tuple) for key in keys):
                mean, std = (self._numbers(key, images[key]) for key in keys)
                return mean, std
        mean, std = _IMAGENET
        half = self._told("imagenet_default_mean_and_std") is False
        if half or self.channels != len(mean):
            mean = std = (0.5,) * self.channels
        self.notes.append(
            f"images: mean {mean}, deviation {std}, since nothing says otherwise; they "
            "are leaves of config.json"
        )
        return mean, std

    def _place(self, source: configs.Tree) -> None:
        """Sets where the images of the run's source are, and their channels."""
        if "channels" in source:
            source.channels = self.channels
        if not self._said.path:
            return
        leaf = next((one for one in ("path", "data_dir") if one in source), None)
        if leaf is None:
            raise ConfigError(
                f"--path={self._said.path!r}: the source {self._said.source!r} has none"
            )
        source[leaf] = self._said.path

    def _check_channels(self, tree: configs.Tree) -> None:
        """Refuses a source that has images of other channels. A source that needs a
        folder or other settings to say so is asked when a run reads it."""
        if {"channels", "path", "data_dir", "source"} & set(tree.data.source):
            return
        try:
            has = configs.build_source(tree).channels
        except ConfigError:
            return
        if has != self.channels:
            raise ConfigError(
                f"--source={self._said.source} has images of {has} channel(s), and "
                f"{self._source.name} learned from those of {self.channels}: want a "
                "source with as many, such as --source=folder, which converts images"
            )

    @property
    def _pairs(self) -> str:
        where = "blocks.0.attn" if self._layout.pairs == "each" else "rel_pos_bias"
        return f"{where}.relative_position_bias_table"

    @property
    def _first(self) -> str:
        return next(iter(self._source.tensors))

    def _of_timm(self, name: str) -> dict[str, Any]:
        """A part of the config.json of a folder of timm; {} where there is none."""
        found = self._source.about.get(name)
        return found if isinstance(found, dict) else {}

    def _numbers(self, name: str, given: Iterable[Any]) -> tuple[float, ...]:
        """Values of a JSON file that must be finite numbers."""
        values = tuple(given)
        for one in values:
            if type(one) not in (int, float) or not abs(one) < math.inf:
                raise ConfigError(
                    f"{self._source.name} has {name}={one!r}: want a finite number"
                )
        return tuple(map(float, values))

    def _told(self, name: str) -> Any:
        """What config.json or the arguments of training say; None: nothing."""
        for given in (self._source.about, self._source.args):
            if name in given:
                return given[name]
        return None

    def _shape(self, name: str, axes: int) -> tuple[int, ...]:
        """Shape of an entry that must be there, and have so many axes."""
        found = self._tensors[name].shape if name in self._tensors else ()
        if len(found) != axes or 0 in found:
            what = list(found) if found else "missing"
            raise ConfigError(
                f"{self._source.name}: {name} is {what}: want an array of {axes} axes"
            )
        return found


def _listed(left: list[str]) -> str:
    return ", ".join(printable(one) for one in sorted(left))
