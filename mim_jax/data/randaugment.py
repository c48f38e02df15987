# SPDX-License-Identifier: Apache-2.0
"""RandAugment on the host, with Pillow, in the form that fine-tuning of ViTs uses."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageOps

from mim_jax.schema import check_ranges, within

_TOP = 10.0  # the greatest magnitude
_BICUBIC = Image.Resampling.BICUBIC


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandAugment:
    """Some random operations per image, arXiv:1909.13719, as `rand-m9-mstd0.5-inc1`.

    It draws `ops` times, with replacement, one of fifteen operations (OPERATIONS) and
    applies it with probability p. The magnitude is normally distributed around
    `magnitude` and cut to 0..10; a greater one is always a stronger change.

    Attributes:
        ops: operations drawn per image; 0: none.
        magnitude: mean magnitude, 0..10.
        deviation: standard deviation of the magnitude.
        p: share of the drawn operations that are applied.
        fill: grey or colour of uncovered pixels, 0..255; one number is used for all
            channels. The default is ImageNet's mean.

    Example:
        >>> image = np.zeros((8, 8, 3), np.uint8)
        >>> RandAugment(ops=2)(image, np.random.default_rng(0)).shape
        (8, 8, 3)
    """

    ops: int = within(0, least=0, most=100)
    magnitude: float = within(9.0, least=0, most=_TOP)
    deviation: float = within(0.5, least=0, most=_TOP)
    p: float = within(0.5, least=0, most=1)
    fill: tuple[int, ...] = within((124, 116, 104), least=0, most=255)

    def __post_init__(self):
        check_ranges(self)

    def check_channels(self, channels: int) -> None:
        """ValueError if images of so many channels cannot be augmented."""
        if self.ops and channels not in (1, 3):
            raise ValueError(
                f"randaugment.ops={self.ops} for images of {channels} channels: want "
                "0, or images of 1 or 3"
            )
        if self.ops and len(self.fill) not in (1, channels):
            raise ValueError(
                f"randaugment.fill={self.fill} for images of {channels} channel(s): "
                "want one number, or one per channel"
            )

    def __call__(
        self, image: UInt8[np.ndarray, "h w c"], rng: np.random.Generator
    ) -> UInt8[np.ndarray, "h w c"]:
        """The augmented image."""
        for _ in range(self.ops):
            name = list(OPERATIONS)[rng.integers(len(OPERATIONS))]
            chosen, sign = rng.random() < self.p, 1 if rng.random() < 0.5 else -1
            magnitude = rng.normal(self.magnitude, self.deviation)
            if chosen:
                share = min(max(magnitude, 0.0), _TOP) / _TOP
                image = operate(image, name, share, sign, self.fill)
        return image


def operate(
    image: UInt8[np.ndarray, "h w c"],
    name: str,
    share: float,
    sign: int,
    fill: tuple[int, ...],
) -> UInt8[np.ndarray, "h w c"]:
    """The image after one operation of OPERATIONS.

    Args:
        share: magnitude as a share 0..1 of the greatest.
        sign: 1 or -1, for operations that have a direction.
        fill: grey or colour of uncovered pixels, 0..255.
    """
    grey = image.shape[2] == 1
    picture = Image.fromarray(image[..., 0] if grey else image)
    colour = fill[0] if grey else (fill * 3)[:3]
    changed = np.asarray(OPERATIONS[name](picture, share, sign, colour))
    return changed.reshape(image.shape)


def _affine(picture, matrix, fill):
    return picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, resample=_BICUBIC, fillcolor=fill
    )


def _shear_x(picture, share, sign, fill):
    return _affine(picture, (1, sign * 0.3 * share, 0, 0, 1, 0), fill)


def _shear_y(picture, share, sign, fill):
    return _affine(picture, (1, 0, 0, sign * 0.3 * share, 1, 0), fill)


def _translate_x(picture, share, sign, fill):
    pixels = sign * 0.45 * share * picture.size[0]
    return _affine(picture, (1, 0, pixels, 0, 1, 0), fill)


def _translate_y(picture, share, sign, fill):
    pixels = sign * 0.45 * share * picture.size[1]
    return _affine(picture, (1, 0, 0, 0, 1, pixels), fill)


def _rotate(picture, share, sign, fill):
    return picture.rotate(sign * 30 * share, resample=_BICUBIC, fillcolor=fill)


def _posterize(picture, share, sign, fill):
    bits = 4 - int(share * 4)
    if bits:
        return ImageOps.posterize(picture, bits)
    return Image.new(picture.mode, picture.size)


def _solarize(picture, share, sign, fill):
    return ImageOps.solarize(picture, 256 - min(256, int(share * 256)))


def _solarize_add(picture, share, sign, fill):
    added = min(128, int(share * 110))
    table = [min(255, i + added) if i < 128 else i for i in range(256)]
    return picture.point(table * len(picture.getbands()))


def _enhanced(kind) -> Callable:
    def change(picture, share, sign, fill):
        return kind(picture).enhance(max(0.1, 1 + sign * 0.9 * share))

    return change


# Each takes a picture, the magnitude's share, a sign and a fill colour.
OPERATIONS: dict[str, Callable] = {
    "auto_contrast": lambda picture, share, sign, fill: ImageOps.autocontrast(picture),
    "equalize": lambda picture, share, sign, fill: ImageOps.equalize(picture),
    "invert": lambda picture, share, sign, fill: ImageOps.invert(picture),
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}
