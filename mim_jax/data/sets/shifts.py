# SPDX-License-Identifier: Apache-2.0
"""Held-out grey images under fixed shifts, in place of the variants of ImageNet."""

import dataclasses
import functools
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, UInt8

from mim_jax.data.decoding import decode
from mim_jax.data.sets.base import EvaluationSet, check_no_folder
from mim_jax.data.sources.base import Source
from mim_jax.data.sources.digits import Digits

# Strong enough to cost accuracy, and weak enough for people to read digits.
BLUR = 0.7  # pixels at a side of 8: the deviation of a Gaussian
NOISE = 0.25  # standard deviation; white is 1
DEGREES = 30.0  # alternately to the left and to the right
CONTRAST = 0.3  # the distance of a pixel from mid-grey is multiplied by it
# Like ImageNet-R, rotated digits have some of the classes, in an order of their own.
# 6 and 9 are not among them, since each could be the other, nor is 8.
ROTATED = (7, 3, 5, 1, 4, 0, 2)

Shift = Literal["blur", "noise", "rotation", "contrast", "inversion"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shifted(EvaluationSet):
    """Images of a source under a shift. Asking for an image twice gives the same.

    Attributes:
        source: the unshifted images, with labels and one channel.
        shift: how the images are changed.
        members: which classes there are, in the order of this set's labels.
    """

    source: Source
    shift: Shift
    classes: tuple[str, ...]
    members: tuple[tuple[int], ...]
    model_classes: int

    @functools.cached_property
    def _chosen(self) -> list[int]:
        return np.flatnonzero(np.isin(self.source.labels(), self.members)).tolist()

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = self._chosen[index]
        record = self.source[number]
        image = shifted(decode(record["image"], 1), self.shift, number)
        return {"image": image, "labels": (self.members.index((record["label"],)),)}


def shifted(
    image: UInt8[np.ndarray, "h w 1"], shift: Shift, index: int
) -> UInt8[np.ndarray, "h w 1"]:
    """A grey image under a shift: a pure function of image, shift and index."""
    from scipy import ndimage  # slow to import, so only when it is used

    pixels: Float[np.ndarray, "h w"] = image[..., 0] / 255
    if shift == "blur":
        # In proportion to the side it would melt the strokes of larger digits.
        deviation = BLUR * (min(pixels.shape) / 8) ** 0.5
        pixels = ndimage.gaussian_filter(pixels, deviation, mode="nearest")
    elif shift == "noise":
        noise = np.random.default_rng([1, index]).standard_normal(pixels.shape)
        pixels = pixels + NOISE * noise
    elif shift == "rotation":
        angle = DEGREES if index % 2 else -DEGREES
        pixels = ndimage.rotate(pixels, angle, reshape=False, order=1)
    elif shift == "contrast":
        pixels = 0.5 + CONTRAST * (pixels - 0.5)
    else:
        pixels = 1 - pixels
    return np.round(255 * np.clip(pixels, 0, 1)).astype(np.uint8)[..., None]


def build(entry: str, folder: str, source: Source, *, shift: Shift) -> Shifted:
    """The held-out images of the run's own source under one shift.

    Raises:
        ValueError: a folder is named, or the source has no labels or has colours.
    """
    check_no_folder(entry, folder)
    if source.channels != 1 or not source.classes:
        raise ValueError(
            f"set {entry!r}: {type(source).__name__} has {source.channels} channel(s) "
            f"and {len(source.classes)} classes: want a grey source with labels, such "
            "as mnist"
        )
    digits = source.classes == tuple("0123456789")
    labels = range(len(source.classes))
    chosen = ROTATED if digits and shift == "rotation" else tuple(labels)
    return Shifted(
        source=source.held_out(),
        shift=shift,
        classes=tuple(source.classes[label] for label in chosen),
        members=tuple((label,) for label in chosen),
        model_classes=len(source.classes),
    )


def of_digits(entry: str, folder: str, source: Source, *, shift: Shift) -> Shifted:
    """The held-out scanned digits under one shift, whatever the run's source is.

    Raises:
        ValueError: a folder is named.
    """
    del source
    return build(entry, folder, Digits(), shift=shift)
