# SPDX-License-Identifier: Apache-2.0
"""Images made from the top down by a hierarchy of latents, which are all known."""

import dataclasses
import functools
import math
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from mim_jax.data.fields import Fields, FieldSpec
from mim_jax.data.sources import drawings
from mim_jax.data.sources.base import Source, check_split
from mim_jax.schema import check_ranges, within
from mim_jax.theory.grammar import Bounds, Grammar, ancestors
from mim_jax.theory.trees import Tree, mean_levels

# Grey level of a pixel value: 0 is the middle, -4 black and 4 white. An objective with
# this mean and deviation predicts the pixel values themselves.
MEAN, STD = 0.5, 0.125


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hierarchy(Source):
    """Images of 2**levels x 2**levels tokens under a quadtree of latents.

    A record has, besides `image` and `label`:

    * `level_0` to `level_N`: the latents of each level, the tokens' first, in rows and
      columns; int32 symbols, or float32 vectors of kind "cascade";
    * `tree`: int32 (levels, rows, columns), the number of the latent of level 1, 2, ...
      above each token of the image.

    An image is a pure function of the seed, the split and its number.

    Attributes:
        kind: "symbols": a random grammar, and a random texture for each symbol of a
            token. "scene": a grammar of things that a person can read, always of three
            levels and tokens of 4 pixels. "cascade": a latent is a vector, inherit * Q
            tanh(parent) + sqrt(1 - inherit**2) * Gaussian noise, with a fixed random
            rotation Q for each child; a token's pixels are linear in its vector.
        levels: of latents above the tokens.
        token: pixels along the side of a token.
        noise: standard deviation of the noise of each pixel; 1 is an eighth of the way
            from black to white.
        shift: move each image, as a torus, by a random number of tokens down and right,
            so that no grid of squares fits its hierarchy.
        symbols, synonyms: of kind "symbols", at each level.
        dimension, inherit: of kind "cascade".
        split: "train" or "held_out".
        images: of the training split.
        held_out_images: of the other one.
        seed: of grammar, textures and images, >= 0.
    """

    kind: Literal["symbols", "scene", "cascade"] = "symbols"
    levels: int = within(3, least=1, most=6)
    token: int = within(4, least=1, most=64)
    noise: float = within(0.3, least=0, most=4)
    shift: bool = False
    symbols: int = within(8, least=2, most=32)
    synonyms: int = within(2, least=1, most=2**15)
    dimension: int = within(4, least=1, most=64)
    inherit: float = within(0.9, least=0, below=1)
    split: str = "train"
    images: int = within(100_000, least=1, most=10**8)
    held_out_images: int = within(2000, least=1, most=10**8)
    seed: int = within(0, least=0, most=2**31 - 1)

    def __post_init__(self):
        check_ranges(self)
        check_split(self.split)
        if self.kind == "scene" and (self.levels, self.token) != (3, 4):
            raise ValueError(
                f"levels={self.levels}, token={self.token} of kind='scene': want "
                f"levels={drawings.LEVELS} and token={drawings.TOKEN}"
            )
        if self.kind == "symbols" and self.synonyms > self.symbols**3:
            raise ValueError(
                f"synonyms={self.synonyms} of symbols={self.symbols}: want at most "
                f"{self.symbols**3}, the cube of symbols"
            )

    @functools.cached_property
    def grammar(self) -> Grammar:
        """The rules of the symbols.

        Raises:
            ValueError: kind "cascade" has none.
        """
        if self.kind == "cascade":
            raise ValueError(
                "kind='cascade' has no grammar: want kind='symbols' or 'scene'"
            )
        if self.kind == "scene":
            return drawings.grammar()[0]
        draw = _Stream(2, self.seed).uniform
        return Grammar.random(self.levels, self.symbols, self.synonyms, draw)

    @functools.cached_property
    def textures(self) -> Float[np.ndarray, "symbols p"]:
        """The mean pixel values of each symbol of a token."""
        if self.kind == "scene":
            return (drawings.grammar()[1] - MEAN) / STD
        drawn = _Stream(3, self.seed).normal(self.symbols * 3 * self.token**2)
        return drawn.reshape(self.symbols, -1)

    @functools.cached_property
    def _tree(self) -> Int[np.ndarray, "levels n n"]:
        return ancestors(self.levels).astype(np.int32)

    @functools.cached_property
    def _rotations(self) -> Float[np.ndarray, "levels 4 d d"]:
        """Of kind "cascade": a rotation for each level and child, the root's first."""
        size = self.levels, 4, self.dimension, self.dimension
        turns, signs = np.linalg.qr(
            _Stream(2, self.seed).normal(math.prod(size)).reshape(size)
        )
        # The signs of columns are the routine's own choice.
        return turns * np.sign(np.diagonal(signs, axis1=2, axis2=3))[:, :, None]

    @functools.cached_property
    def _mixing(self) -> Float[np.ndarray, "d p"]:
        """Of kind "cascade": from the vector of a token to its pixel values."""
        size = self.dimension, 3 * self.token**2
        drawn = _Stream(3, self.seed).normal(math.prod(size)).reshape(size)
        return drawn / np.sqrt(self.dimension)

    def bounds(self, hidden: Bool[np.ndarray, "b n"]) -> Bounds:
        """The errors on hidden tokens of the best model and of one that looks at
        nothing, for the first b records of this split.

        They are in the units of a loss whose objective has MEAN and STD and does not
        normalise patches, with one ViT patch per token. With `shift`, the optimum is
        that of a model which is told each image's shift, so no model reaches it where
        the visible tokens leave the shift open.

        Args:
            hidden: True at hidden tokens, row by row; every image hides as many.
        Raises:
            ValueError: kind "cascade" has no exact optimum.
        """
        grammar, side = self.grammar, 2**self.levels
        tokens = np.zeros((len(hidden), side, side), int)
        masks = hidden.reshape(tokens.shape).copy()
        for index in range(len(hidden)):
            symbols, _, shift = self._drawn(index)
            tokens[index] = symbols[-1]
            masks[index] = np.roll(masks[index], [-one for one in shift], (0, 1))
        return grammar.bounds(tokens, masks, self.textures, self.noise, self.shift)

    def known(self, hidden: Bool[np.ndarray, "b n"]) -> dict[str, float]:
        """An error that no model goes below ("error_optimum"), that of a model
        which looks at nothing ("error_floor"), and the mean level of Theorem 1's c by
        two readings; what of this is known, for patches that are tokens."""
        found: dict[str, float] = {}
        if hidden.shape[1] != 4**self.levels:
            return found
        if self.kind != "cascade":
            optimum, floor = self.bounds(hidden)
            found |= dict(error_optimum=optimum * STD**2, error_floor=floor * STD**2)
        if not self.shift:
            tree = Tree.quadtree(self.levels)
            for reading in ("frontier", "invertible"):
                mean, _ = mean_levels(tree.level_counts(hidden, reading))
                found[f"level_of_c_{reading}"] = float(mean.mean())
        return found

    def _drawn(self, index: int) -> tuple[list[np.ndarray], "_Stream", tuple[int, int]]:
        """Latents of a record, the stream for its pixels, and its shift."""
        stream = _Stream(("train", "held_out").index(self.split), self.seed, index)
        side = 2**self.levels
        down, right = (int(one * side) for one in stream.uniform(2))
        shift = (down, right) if self.shift else (0, 0)
        if self.kind == "cascade":
            return self._cascade(stream), stream, shift
        root = np.array([index % len(self.classes)])
        symbols = self.grammar.sample(root, stream.uniform)
        return [one[0].astype(np.int32) for one in symbols], stream, shift

    def _cascade(self, stream: "_Stream") -> list[Float[np.ndarray, "_rows _cols d"]]:
        found = [stream.normal(self.dimension).reshape(1, 1, -1)]
        for turns in self._rotations:
            mean = self.inherit * np.einsum("kij,rcj->rcki", turns, np.tanh(found[-1]))
            rows, cols, _, size = mean.shape
            mean = mean.reshape(rows, cols, 2, 2, size).swapaxes(1, 2)
            mean = mean.reshape(2 * rows, 2 * cols, size)
            noise = stream.normal(mean.size).reshape(mean.shape)
            found.append(mean + np.sqrt(1 - self.inherit**2) * noise)
        return [one.astype(np.float32) for one in found]

    def __len__(self) -> int:
        return self.images if self.split == "train" else self.held_out_images

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"index={index}: want 0 <= index < {len(self)}")
        latents, stream, shift = self._drawn(index)
        latents[-1] = np.roll(latents[-1], shift, (0, 1))
        if self.kind == "cascade":
            means = latents[-1] @ self._mixing
        else:
            means = self.textures[latents[-1]]
        levels = {f"level_{i}": one for i, one in enumerate(latents[::-1])}
        tree = np.roll(self._tree, shift, (1, 2))
        label = int(index % len(self.classes)) if self.classes else -1
        image = self._image(means, stream)
        return {"image": image, "label": label, "tree": tree, **levels}

    def _image(
        self, means: Float[np.ndarray, "rows cols p"], stream: "_Stream"
    ) -> UInt8[np.ndarray, "h w 3"]:
        side = len(means) * self.token
        values = means.reshape(*means.shape[:2], self.token, self.token, 3)
        values = values.swapaxes(1, 2).reshape(side, side, 3)
        values = values + self.noise * stream.normal(values.size).reshape(values.shape)
        return np.round(255 * np.clip(MEAN + STD * values, 0, 1)).astype(np.uint8)

    def fields(self) -> Fields:
        return dict(self._fields)

    @functools.cached_property  # asked for with every record
    def _fields(self) -> Fields:
        side = 2**self.levels
        found = {"tree": FieldSpec((self.levels, side, side), np.int32, fill=-1)}
        for level in range(self.levels + 1):
            shape = (side >> level, side >> level)
            found[f"level_{level}"] = (
                FieldSpec((*shape, self.dimension), np.float32)
                if self.kind == "cascade"
                else FieldSpec(shape, np.int32, fill=-1)
            )
        return found

    @property
    def classes(self) -> tuple[str, ...]:
        if self.kind == "cascade":
            return ()
        if self.kind == "scene":
            return drawings.SCENES
        return tuple(map(str, range(self.symbols)))

    @property
    def channels(self) -> int:
        return 3

    def labels(self) -> Int[np.ndarray, " n"]:
        if not self.classes:
            return np.full(len(self), -1, np.int32)
        return np.arange(len(self), dtype=np.int32) % len(self.classes)

    def held_out(self) -> "Hierarchy":
        return dataclasses.replace(self, split="held_out")

    def fingerprint(self) -> dict[str, Any]:
        counts = ("images", "held_out_images")
        found = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in counts
        }
        return {"name": "hierarchy", "count": len(self), **found}


class _Stream:
    """Random numbers by whole numbers that seed them, the same in every NumPy."""

    def __init__(self, *seeds: int):
        # Raw bits of a named generator are the same in every version.
        self._bits = np.random.PCG64(np.random.SeedSequence(seeds))

    def uniform(self, count: int) -> Float[np.ndarray, " count"]:
        """Numbers in [0, 1)."""
        return (self._bits.random_raw(count) >> np.uint64(11)) * 2.0**-53

    def normal(self, count: int) -> Float[np.ndarray, " count"]:
        """Standard normal numbers, after Box and Muller."""
        half = -(-count // 2)
        radius = np.sqrt(-2 * np.log1p(-self.uniform(half)))
        angle = 2 * np.pi * self.uniform(half)
        both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        return both[:count]
