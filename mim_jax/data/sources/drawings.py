# SPDX-License-Identifier: Apache-2.0
"""Small scenes as a hierarchy: scene, things, parts, and tokens of 4 x 4 pixels.

A scene has four things, one in each quarter. A thing has one of two looks, a look has
four parts, and each part is bright or dim. A person can read the pictures, and still
every choice is one of a `Grammar`, so that inference is exact.
"""

import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float

from mim_jax.theory.grammar import Grammar

TOKEN, LEVELS = 4, 3
_SIDE = 16  # pixels along the side of a thing
# The four things of each scene: top left, top right, bottom left, bottom right.
_SCENES = {
    "village": (
        *("sun cloud house house", "cloud bird house tree"),
        "bird sun tree house",
    ),
    "harbour": (
        *("sun bird boat boat", "bird cloud boat house"),
        "cloud sun house boat",
    ),
    "forest": (
        *("cloud bird tree tree", "sun cloud tree hill"),
        "bird cloud hill tree",
    ),
    "mountains": (
        *("cloud sun hill hill", "bird sun hill tree"),
        "sun bird house hill",
    ),
    "fair": (
        *("balloon sun house tree", "sun balloon tree house"),
        "bird balloon boat tree",
    ),
    "lake": (
        *("sun cloud boat hill", "cloud balloon hill boat"),
        "balloon bird boat tree",
    ),
}
SCENES = tuple(_SCENES)
# So chosen that no two tokens look alike under the default noise.
_COLOURS = {
    "sky": (0.62, 0.8, 0.95),
    "ground": (0.45, 0.68, 0.35),
    "water": (0.25, 0.45, 0.75),
    "white": (0.92, 0.92, 0.92),
    "dark": (0.42, 0.42, 0.48),
    "yellow": (0.92, 0.8, 0.2),
    "red": (0.8, 0.25, 0.2),
    "brown": (0.5, 0.33, 0.18),
    "green": (0.15, 0.45, 0.2),
    "grey": (0.4, 0.37, 0.42),
    "cream": (0.9, 0.82, 0.62),
}
_DIM = 0.6  # how bright a dim part is

Number = int | float
Layer = tuple[Bool[np.ndarray, "16 16"], str]


@functools.cache
def grammar() -> tuple[Grammar, Float[np.ndarray, "symbols 48"]]:
    """The rules of the scenes, and the pixels of each token in 0..1: 4 x 4 x 3."""
    tokens, parts = _Table(), _Table()
    part_rules: list[list[list[int]]] = []
    looks = []
    for layers_of in _THINGS.values():
        looks.append([])
        for look in (0, 1):
            shades = [_painted(layers_of(look), shade) for shade in (1.0, _DIM)]
            looks[-1].append([])
            for both in zip(*(_cut(shade, 8) for shade in shades), strict=True):
                place = parts.place(np.concatenate(both))
                looks[-1][-1].append(place)
                if place == len(part_rules):
                    synonyms = [map(tokens.place, _cut(one, TOKEN)) for one in both]
                    part_rules.append([list(one) for one in synonyms])
    names = list(_THINGS)
    scenes = [
        [[names.index(thing) for thing in text.split()] for text in texts]
        for texts in _SCENES.values()
    ]
    rules = tuple(np.array(rule) for rule in (scenes, looks, part_rules))
    return Grammar(rules), np.array(tokens.rows).reshape(len(tokens.rows), -1)


class _Table:
    """Different arrays, each with its place."""

    def __init__(self):
        self.rows: list[np.ndarray] = []
        self._places: dict[bytes, int] = {}

    def place(self, row: np.ndarray) -> int:
        """The place of an array, which is added if it is new."""
        place = self._places.setdefault(row.tobytes(), len(self.rows))
        if place == len(self.rows):
            self.rows.append(row)
        return place


def _cut(picture: np.ndarray, side: int) -> list[np.ndarray]:
    """The four quarters of a picture, of so many pixels a side."""
    halves = slice(0, side), slice(side, 2 * side)
    return [picture[rows, cols] for rows in halves for cols in halves]


def _painted(layers: list[Layer], shade: Number) -> Float[np.ndarray, "16 16 3"]:
    """Layers one over the other; all but the backgrounds are as bright as `shade`."""
    found = np.full((_SIDE, _SIDE, 3), _COLOURS["sky"])
    for inside, colour in layers:
        bright = 1.0 if colour in ("ground", "water") else shade
        found[inside] = bright * np.array(_COLOURS[colour])
    return found


_Y, _X = np.meshgrid(np.arange(_SIDE) + 0.5, np.arange(_SIDE) + 0.5, indexing="ij")


def _box(top: Number, bottom: Number, left: Number, right: Number):
    return (_Y > top) & (_Y < bottom) & (_X > left) & (_X < right)


def _disc(row: Number, col: Number, radius: Number):
    return np.hypot(_Y - row, _X - col) < radius


def _peak(top: Number, bottom: Number, col: Number, half: Number):
    """A triangle with its point up, `half` as wide as its base."""
    inside = np.abs(_X - col) < half * (_Y - top) / (bottom - top)
    return inside & (_Y > top) & (_Y < bottom)


def _land() -> Layer:
    return _Y > 13, "ground"


def _sun(look: int) -> list[Layer]:
    angle = np.arctan2(_Y - 8, _X - 8)
    rays = (np.cos(8 * angle) > 0.3) & _disc(8, 8, 7.6) & ~_disc(8, 8, 5.2)
    return [(rays & (look == 1), "yellow"), (_disc(8, 8, 4.2), "yellow")]


def _cloud(look: int) -> list[Layer]:
    col = (5, 11)[look]
    low = _disc(9, 4, 2.8) | _disc(9, 12, 2.8) | _box(8, 11.8, 4, 12)
    return [(low | _disc(7.2, col, 3.7) | _disc(8, 8, 3), "white")]


def _bird(look: int) -> list[Layer]:
    def wings(row, col):
        arc = np.abs(_Y - row - 0.12 * (np.abs(_X - col) - 3) ** 2) < 0.9
        return arc & (np.abs(_X - col) < 5)

    inside = wings(7, 8) if look == 0 else wings(3.5, 5.5) | wings(10.5, 10.5)
    return [(inside, "dark")]


def _balloon(look: int) -> list[Layer]:
    ball, basket = _disc(6, 8, 5), _box(12.5, 15, 6.5, 9.5)
    ropes = (np.abs(np.abs(_X - 8) - 2.2) < 0.6) & _box(10, 13, 0, 16)
    stripes = ball & (_X.astype(int) // 2 % 2 == 0) & (look == 1)
    found = [(ropes, "dark"), (basket, "brown"), (ball, "red"), (stripes, "white")]
    return found


def _house(look: int) -> list[Layer]:
    door, window = ((4, 6.9), (9, 12)) if look == 0 else ((9, 11.9), (4, 7))
    return [
        _land(),
        (_box(7, 14, 3, 13), "cream"),
        (_peak(1, 7.5, 8, 6.5), "red"),
        (_box(9, 14, *door), "brown"),
        (_box(8.9, 12, *window), "dark"),
    ]


def _tree(look: int) -> list[Layer]:
    crown = _disc(6, 8, 5) if look == 0 else _peak(0, 11.5, 8, 5.5)
    return [_land(), (_box(9, 15, 7, 9), "brown"), (crown, "green")]


def _boat(look: int) -> list[Layer]:
    hull = _box(10.5, 13.5, 2, 14) & (np.abs(_X - 8) < 6.5 - 0.8 * (_Y - 10.5))
    side = _X > 8 if look == 0 else _X < 8
    return [
        (_Y > 12, "water"),
        (_box(1, 11, 7.4, 8.6), "brown"),
        (hull, "brown"),
        (_peak(1, 10, 8, 6) & side, "white"),
    ]


def _hill(look: int) -> list[Layer]:
    found = [_land(), (_peak(2, 14, 8, 7.5), "grey")]
    if look == 1:
        found.append((_peak(2, 14, 8, 7.5) & (_Y < 6.5), "white"))
    return found


_THINGS: dict[str, Callable[[int], list[Layer]]] = {
    "sun": _sun,
    "cloud": _cloud,
    "bird": _bird,
    "balloon": _balloon,
    "house": _house,
    "tree": _tree,
    "boat": _boat,
    "hill": _hill,
}
