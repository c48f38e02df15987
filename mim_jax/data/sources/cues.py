# SPDX-License-Identifier: Apache-2.0
"""Drawn shapes filled with textures: labelled images that need no file.

In both splits, an image has the shape and the texture of its class, so either of the
two tells the class. `mim_jax.data.sets.conflicts` draws images with the shape of one
class and the texture of another, which show whether a model uses shape or texture.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8

from mim_jax.data.sources.base import Source, check_split
from mim_jax.schema import check_ranges, within

SIZE = 32
# Class k has shape k and texture k, and the name of its shape.
SHAPES = ("disc", "square", "triangle", "plus", "ring", "diamond", "hourglass", "arch")
TEXTURES = (
    *("rows", "columns", "rising", "falling"),
    *("checker", "dots", "grid", "grain"),
)
_FINE = 3  # points per pixel and direction; a pixel is the mean of its points


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cues(Source):
    """Grey drawings of 32 x 32 pixels, eight classes in turn.

    Place, size, brightness, contrast and period are random. An image is a pure function
    of the seed, the split and its number.

    Attributes:
        split: "train" or "held_out".
        images: of the training split.
        held_out_images: of the other one.
        seed: of the drawings, >= 0.
    """

    split: str = "train"
    images: int = within(4000, least=len(SHAPES), most=10**8)
    held_out_images: int = within(800, least=len(SHAPES), most=10**8)
    seed: int = within(0, least=0, most=2**31 - 1)

    def __post_init__(self):
        check_ranges(self)
        check_split(self.split)

    @functools.cached_property
    def _drawn(self) -> dict[int, UInt8[np.ndarray, "32 32 1"]]:
        return {}  # 1 kB per image, held so that each image is drawn once

    def __len__(self) -> int:
        return self.images if self.split == "train" else self.held_out_images

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"index={index}: want 0 <= index < {len(self)}")
        label = index % len(SHAPES)
        if index not in self._drawn:
            split = ("train", "held_out").index(self.split)
            image = render(label, label, (split, self.seed, index))
            image.flags.writeable = False  # shared by every reader
            self._drawn[index] = image
        return {"image": self._drawn[index], "label": label}

    @property
    def classes(self) -> tuple[str, ...]:
        return SHAPES

    @property
    def channels(self) -> int:
        return 1

    def labels(self) -> np.ndarray:
        return np.arange(len(self), dtype=np.int32) % len(SHAPES)

    def held_out(self) -> "Cues":
        return dataclasses.replace(self, split="held_out")

    def fingerprint(self) -> dict[str, Any]:
        return {
            "name": "cues",
            "split": self.split,
            "count": len(self),
            "seed": self.seed,
        }


def render(
    shape: int, texture: int, stream: tuple[int, ...]
) -> UInt8[np.ndarray, "32 32 1"]:
    """One drawing.

    Args:
        shape, texture: positions in SHAPES and TEXTURES.
        stream: whole numbers that seed everything else.
    """
    # Raw bits of a named generator are the same in every version of NumPy.
    bits = np.random.PCG64(np.random.SeedSequence(stream))
    uniform = functools.partial(_uniform, bits)
    radius = uniform(0.3, 0.42) * SIZE
    row, col = (uniform(radius + 1, SIZE - radius - 1) for _ in range(2))
    # Both levels of a texture differ from the background, so that shapes have no gaps.
    background, dark, light = uniform(0.4, 0.6), uniform(0.0, 0.25), uniform(0.75, 1.0)
    points = (np.arange(SIZE * _FINE) + 0.5) / _FINE
    y, x = np.meshgrid(points, points, indexing="ij")
    inside = _inside(SHAPES[shape], (y - row) / radius, (x - col) / radius)
    period, grain = uniform(4.0, 6.0), bits.random_raw(SIZE * SIZE // 4) >> 63
    phases = uniform(0.0, 6.0), uniform(0.0, 6.0)
    bright = _bright(TEXTURES[texture], y + phases[0], x + phases[1], period, grain)
    fill = np.where(bright, light, dark)
    picture = np.where(inside, fill, background)
    picture = picture.reshape(SIZE, _FINE, SIZE, _FINE).mean(axis=(1, 3))
    return np.round(255 * picture).astype(np.uint8)[..., None]


def _uniform(bits: np.random.PCG64, low: float, high: float) -> float:
    return low + (high - low) * int(bits.random_raw()) / 2**64


def _inside(
    shape: str, y: Float[np.ndarray, "h w"], x: Float[np.ndarray, "h w"]
) -> Bool[np.ndarray, "h w"]:
    """Which points lie in a shape; it spans -1 to 1 in both directions, y downwards."""
    across, along = np.abs(x), np.abs(y)
    most, least = np.maximum(across, along), np.minimum(across, along)
    if shape == "disc":
        return most * most + least * least <= 1
    if shape == "square":
        return most <= 0.85
    if shape == "triangle":
        return (along <= 0.9) & (across <= (y + 0.9) / 1.8)
    if shape == "plus":
        return (most <= 1) & (least <= 0.34)
    if shape == "ring":
        length = np.hypot(x, y)
        return (length <= 1) & (length >= 0.52)
    if shape == "diamond":
        return across + along <= 1.05
    if shape == "hourglass":
        return (along <= 0.95) & (across <= along)
    return (most <= 0.9) & ((across >= 0.4) | (y <= -0.3))  # arch


def _bright(
    texture: str,
    y: Float[np.ndarray, "h w"],
    x: Float[np.ndarray, "h w"],
    period: float,
    grain: np.ndarray,
) -> Bool[np.ndarray, "h w"]:
    """Which points of a texture are light: a third to a half of them."""

    def stripes(distance):
        return (distance / period) % 1 < 0.5  # as wide as the gaps between them

    if texture == "grain":  # squares of 2 x 2 pixels, randomly light or dark
        cells = grain.reshape(SIZE // 2, SIZE // 2).astype(bool)
        return cells.repeat(2 * _FINE, axis=0).repeat(2 * _FINE, axis=1)
    if texture == "dots":
        row, col = (y / period) % 1 - 0.5, (x / period) % 1 - 0.5
        return np.hypot(row, col) <= 0.32  # larger dots would touch and form a grid
    if texture == "grid":
        return ((y / period) % 1 < 0.3) | ((x / period) % 1 < 0.3)
    if texture == "checker":
        return stripes(y) ^ stripes(x)
    slope = {"rows": (1, 0), "columns": (0, 1), "rising": (1, 1), "falling": (-1, 1)}
    down, right = slope[texture]
    return stripes((down * y + right * x) / np.hypot(down, right))
