# SPDX-License-Identifier: Apache-2.0
"""The held-out digits under fixed shifts, in place of the variants of ImageNet."""

import dataclasses
import functools
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, UInt8

from mim_jax.data.sets.base import EvaluationSet, check_no_folder
from mim_jax.data.sources.base import Source
from mim_jax.data.sources.digits import Digits

# Strong enough to cost accuracy, and weak enough for people to read the digits.
BLUR = 0.7  # pixels, the deviation of a Gaussian
NOISE = 0.25  # standard deviation; white is 1
DEGREES = 30.0  # alternately to the left and to the right
CONTRAST = 0.3  # the distance of a pixel from mid-grey is multiplied by it
# Like ImageNet-R, rotated digits have some of the classes, in an order of their own.
# 6 and 9 are not among them, since each could be the other, nor is 8.
ROTATED = (7, 3, 5, 1, 4, 0, 2)

Shift = Literal["blur", "noise", "rotation", "contrast", "inversion"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShiftedDigits(EvaluationSet):
    """Held-out digits under a shift. Asking for an image twice gives the same.

    Attributes:
        shift: how the images are changed.
        members: which digits there are, in the order of this set's labels.
    """

    shift: Shift
    classes: tuple[str, ...]
    members: tuple[tuple[int], ...]
    model_classes: int = 10

    @functools.cached_property
    def _records(self) -> tuple[Digits, list[int]]:
        source = Digits(split="held_out")
        chosen = np.flatnonzero(np.isin(source.labels(), self.members))
        return source, chosen.tolist()

    def __len__(self) -> int:
        return len(self._records[1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        source, chosen = self._records
        record = source[chosen[index]]
        image = shifted(record["image"], self.shift, chosen[index])
        return {"image": image, "labels": (self.members.index((record["label"],)),)}


def shifted(
    image: UInt8[np.ndarray, "h w 1"], shift: Shift, index: int
) -> UInt8[np.ndarray, "h w 1"]:
    """A grey image under a shift: a pure function of image, shift and index."""
    from scipy import ndimage  # slow to import, so only when it is used

    pixels: Float[np.ndarray, "h w"] = image[..., 0] / 255
    if shift == "blur":
        pixels = ndimage.gaussian_filter(pixels, BLUR, mode="nearest")
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


def build(entry: str, folder: str, source: Source, *, shift: Shift) -> ShiftedDigits:
    """The digits under one shift.

    Raises:
        ValueError: a folder is named.
    """
    del source
    check_no_folder(entry, folder)
    digits = ROTATED if shift == "rotation" else tuple(range(10))
    return ShiftedDigits(
        shift=shift,
        classes=tuple(map(str, digits)),
        members=tuple((digit,) for digit in digits),
    )
