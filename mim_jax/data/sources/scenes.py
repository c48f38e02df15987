# SPDX-License-Identifier: Apache-2.0
"""Scenes: handwritten digits and drawn shapes over photographs, with boxes and masks.

Each object is painted in one colour with a hard edge, so that its mask is exactly the
pixels that it shows, and its box exactly those of its mask.
"""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool
from PIL import Image

from mim_jax.data.segments import box_of, runs_of
from mim_jax.data.sources.base import Source, check_split
from mim_jax.data.sources.mnist import Mnist
from mim_jax.data.sources.photos import Photos
from mim_jax.schema import check_ranges, within

_DIGITS = tuple("0123456789")
# Drawing a scene takes 3 ms, so a process keeps those of a split that has at most so
# many, with at most so many bytes of pixels.
_KEPT, _KEPT_BYTES = 2**13, 2**27


def _disc(y, x):
    return np.hypot(y, x) < 1


def _square(y, x):
    return (np.abs(y) < 0.85) & (np.abs(x) < 0.85)


def _triangle(y, x):
    return (y < 0.8) & (np.abs(x) < (y + 1) * 0.55)


def _star(y, x):
    angle = np.arctan2(x, -y)
    part = np.abs((angle * 5 / (2 * math.pi) + 0.5) % 1 - 0.5) * 2  # 0 at the points
    return np.hypot(y, x) < 1 - 0.6 * part


# From places in -1..1, down and to the right, to whether they are inside.
_SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": _disc,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scenes(Source):
    """Images of `side` x `side` pixels with one to `most` objects of 14 classes: the
    ten digits, disc, square, triangle and star.

    Digits come from MNIST's and backgrounds are crops of the photographs inside the
    installed packages; the held-out scenes use those digits and photographs that
    `mnist` and `photos` hold out. Objects overlap, but each shows at least `visible`
    of its pixels.

    Attributes:
        images: of the training split.
        held_out_images: of the other.
        side: rows and columns, in pixels.
        most: objects of an image.
        sides: least and greatest side of an object, as a share of the image's.
        visible: least share of an object's pixels that later ones leave uncovered.
        split: "train" or "held_out".
        channels: 1 makes all scenes grey.
    """

    images: int = within(5000, least=1, most=2**24)
    held_out_images: int = within(500, least=1, most=2**24)
    side: int = within(64, least=16, most=1024)
    most: int = within(3, least=1, most=100)
    sides: tuple[float, float] = within((0.25, 0.5), above=0, most=1)
    visible: float = within(0.8, above=0, most=1)
    split: str = "train"
    # This field implements the property.
    channels: Literal[1, 3] = 3  # pyright: ignore

    def __post_init__(self):
        check_split(self.split)
        check_ranges(self)
        if self.sides[0] > self.sides[1]:
            raise ValueError(f"sides={self.sides}: want least <= greatest")
        _ = self._digits, self._photos  # raises if their files are not installed

    @functools.cached_property
    def _digits(self) -> Mnist:
        return Mnist(split=self.split)

    @functools.cached_property
    def _photos(self) -> Photos:
        return Photos(split=self.split)

    @functools.cached_property
    def _by_digit(self) -> list[np.ndarray]:
        """Positions of the digits of each class."""
        labels = self._digits.labels()
        return [np.flatnonzero(labels == digit) for digit in range(10)]

    def __len__(self) -> int:
        return self.images if self.split == "train" else self.held_out_images

    @functools.cached_property
    def _kept(self) -> dict[int, dict[str, Any]]:
        """Records that this process has drawn before."""
        return {}

    @functools.cached_property
    def _keeps(self) -> bool:
        pixels = len(self) * self.side**2 * self.channels
        return len(self) <= _KEPT and pixels <= _KEPT_BYTES

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        if not self._keeps:
            return self._draw(index)
        if index not in self._kept:
            self._kept[index] = self._draw(index)
        return copy.deepcopy(self._kept[index])

    def _draw(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng([index, self.split == "train"])
        image = self._background(rng)
        masks, classes, whole = [], [], []
        wanted = int(rng.integers(1, self.most + 1))
        for _ in range(4 * wanted):
            if len(masks) == wanted:
                break
            label = int(rng.integers(len(self.object_classes)))
            mask = self._placed(label, rng)
            rest = [one & ~mask for one in masks]
            shown = zip(rest, whole, strict=True)
            if any(one.sum() < self.visible * count for one, count in shown):
                continue
            image[mask] = _colour(image[mask].mean(axis=0), rng)
            masks, classes = [*rest, mask], [*classes, label]
            whole.append(int(mask.sum()))
        if self.channels == 1:
            image = np.array(Image.fromarray(image).convert("L"))[..., None]
        return {
            "image": image,
            "label": -1,
            "boxes": np.array([box_of(one) for one in masks], np.float32),
            "classes": np.array(classes, np.int32),
            "crowd": np.zeros(len(masks), bool),
            "areas": np.array([one.sum() for one in masks], np.float64),
            "segments": [runs_of(one) for one in masks],
            "ids": list(range(len(masks))),
        }

    def _background(self, rng: np.random.Generator) -> np.ndarray:
        photos = self._photos
        pixels = photos[int(rng.integers(len(photos)))]["image"]
        rows, cols = pixels.shape[:2]
        least = min(self.side, rows, cols)
        side = int(rng.integers(least, min(rows, cols) + 1))
        top, left = (int(rng.integers(n - side + 1)) for n in (rows, cols))
        cut = Image.fromarray(pixels[top : top + side, left : left + side])
        cut = cut.resize((self.side, self.side), Image.Resampling.BICUBIC)
        return np.array(cut)

    def _placed(self, label: int, rng: np.random.Generator) -> Bool[np.ndarray, "h w"]:
        """The mask of a new object, all of it inside of the image."""
        low, high = (math.log(share * self.side) for share in self.sides)
        side = max(4, round(math.exp(rng.uniform(low, high))))
        if label < len(_DIGITS):
            shape = self._digit(label, side, rng)
        else:
            shape = _drawn(label - len(_DIGITS), side, rng)
        left, top, right, bottom = box_of(shape)
        shape = shape[top:bottom, left:right]
        rows, cols = shape.shape
        mask = np.zeros((self.side, self.side), bool)
        top, left = (int(rng.integers(self.side - n + 1)) for n in (rows, cols))
        mask[top : top + rows, left : left + cols] = shape
        return mask

    def _digit(self, digit: int, side: int, rng: np.random.Generator) -> np.ndarray:
        """A digit that is `side` pixels high, or wide if that is more."""
        pixels = self._digits[int(rng.choice(self._by_digit[digit]))]["image"][..., 0]
        left, top, right, bottom = box_of(pixels > 127)
        cut = Image.fromarray(pixels[top:bottom, left:right])
        zoom = side / max(cut.size)
        size = [max(1, round(zoom * n)) for n in cut.size]
        found = np.array(cut.resize((size[0], size[1]), Image.Resampling.BICUBIC)) > 127
        return found if found.any() else np.ones_like(found)

    @property
    def classes(self) -> tuple[str, ...]:
        return ()  # of a whole image

    @property
    def object_classes(self) -> tuple[str, ...]:
        return (*_DIGITS, *_SHAPES)

    def labels(self) -> np.ndarray:
        return np.full(len(self), -1, np.int32)

    def held_out(self) -> "Scenes":
        return self._held_out

    @functools.cached_property
    def _held_out(self) -> "Scenes":
        return dataclasses.replace(self, split="held_out")

    def fingerprint(self) -> dict[str, Any]:
        # The number of training images is no part of a held-out image, nor the other
        # way round.
        own = dataclasses.asdict(self)
        del own["images"], own["held_out_images"]
        return {"name": "scenes", "count": len(self), **_plain(own)}


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}


def _drawn(number: int, side: int, rng: np.random.Generator) -> np.ndarray:
    """A shape that was turned by up to a twelfth of a circle."""
    inside = list(_SHAPES.values())[number]
    ends = (np.arange(side) + 0.5) / side * 2 - 1
    y, x = np.meshgrid(ends, ends, indexing="ij")
    angle = rng.uniform(-1, 1) * math.pi / 6
    turned = inside(
        y * math.cos(angle) - x * math.sin(angle),
        y * math.sin(angle) + x * math.cos(angle),
    )
    return turned if turned.any() else np.ones_like(turned)


def _colour(behind: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A colour that differs from what it covers by at least 80 of 255 in brightness,
    on average."""
    for _ in range(20):
        colour = rng.integers(0, 256, 3)
        if abs(float(colour.mean() - behind.mean())) >= 80:
            return colour.astype(np.uint8)
    return np.full(3, 0 if behind.mean() > 127 else 255, np.uint8)
