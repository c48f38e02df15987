# SPDX-License-Identifier: Apache-2.0
"""Sizes and crops: what turns a stored image into the images of an example."""

import dataclasses
from typing import Literal

import numpy as np

from mim_jax.data import transforms
from mim_jax.data.randaugment import RandAugment
from mim_jax.data.sources.base import Source
from mim_jax.data.transforms import View
from mim_jax.schema import check_ranges, within


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """A source, and the sizes and crops in which its images are shown.

    These are leaves of config.data. A plug-in of the kind `Examples` gets them with
    every record.
    """

    source: Source
    # Rows and columns.
    image_size: tuple[int, int] = within((224, 224), least=1, most=2**14)
    # Shares of the image's area, and widths divided by heights.
    crop_scale: tuple[float, float] = within((0.2, 1.0), above=0, most=1)
    crop_ratio: tuple[float, float] = within((0.75, 4 / 3), least=1e-3, most=1e3)
    crop_retry: bool = True  # False: one draw, cut to the image, as in BYOL
    crops: Literal[1, 2] = 1  # of an image: 1, or 2 for methods that compare two
    # Further, smaller crops of an image.
    local_crops: int = within(0, least=0, most=1000)
    local_size: tuple[int, int] = within((96, 96), least=1, most=2**14)
    local_scale: tuple[float, float] = within((0.05, 0.25), above=0, most=1)
    flip: bool = True  # mirror one image of two left to right
    randaugment: RandAugment = RandAugment()  # of every crop, after the flip
    eval_crop_fraction: float = within(0.875, least=0.01, most=1)  # 224 of 256

    def __post_init__(self):
        check_ranges(self)
        self.randaugment.check_channels(self.source.channels)
        for name in ("crop_scale", "crop_ratio", "local_scale"):
            least, greatest = getattr(self, name)
            if least > greatest:
                raise ValueError(f"{name}={(least, greatest)}: want least <= greatest")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Rows, columns and channels of every image of a batch."""
        return (*self.image_size, self.source.channels)

    def suffices(self, shape: tuple[int, int]) -> bool:
        """Whether every random crop of an image of so many rows and columns has at
        least as many pixels as it is resized to. If so, training decodes a large JPEG
        to no more than that size."""
        crops = [(self.image_size, self.crop_scale)]
        if self.local_crops:
            crops.append((self.local_size, self.local_scale))
        for size, scale in crops:
            rows, cols = transforms.least_box(shape, scale, self.crop_ratio)
            if rows < size[0] or cols < size[1]:
                return False
        return True

    def sample_view(
        self, shape: tuple[int, int], rng: np.random.Generator, local: bool = False
    ) -> View:
        """A random crop, as training shows it, mirrored in one case of two if `flip`.

        Args:
            shape: rows and columns of the decoded image.
            local: one of the smaller crops.
        """
        return transforms.sample_view(
            shape,
            self.local_size if local else self.image_size,
            self.local_scale if local else self.crop_scale,
            self.crop_ratio,
            rng,
            retry=self.crop_retry,
            flip=self.flip,
        )

    def centre_view(self, shape: tuple[int, int]) -> View:
        """The centre crop, as evaluation shows it.

        Args:
            shape: rows and columns of the decoded image.
        """
        return transforms.centre_view(shape, self.image_size, self.eval_crop_fraction)
