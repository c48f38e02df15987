# SPDX-License-Identifier: Apache-2.0
"""Sizes and crops: what turns a stored image into the images of an example."""

import dataclasses

import numpy as np

from mim_jax.data import transforms
from mim_jax.data.randaugment import RandAugment
from mim_jax.data.sources.base import Source
from mim_jax.data.transforms import View


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """A source, and the sizes and crops in which its images are shown.

    These are leaves of config.data. A plug-in of the kind `Examples` gets them with
    every record.
    """

    source: Source
    image_size: tuple[int, int] = (224, 224)  # rows, columns
    crop_scale: tuple[float, float] = (0.2, 1.0)  # share of the image's area
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)  # width / height
    crop_retry: bool = True  # False: one draw, cut to the image, as in BYOL
    crops: int = 1  # of an image: 1, or 2 for methods that compare two
    local_crops: int = 0  # further, smaller crops of an image
    local_size: tuple[int, int] = (96, 96)
    local_scale: tuple[float, float] = (0.05, 0.25)
    flip: bool = True  # mirror one image of two left to right
    randaugment: RandAugment = RandAugment()  # of every crop, after the flip
    eval_crop_fraction: float = 0.875  # 224 of 256

    def __post_init__(self):
        for name in ("image_size", "local_size"):
            size = getattr(self, name)
            if len(size) != 2 or min(size) < 1:
                raise ValueError(f"{name}={size}: want (rows, columns) >= 1")
        if self.crops not in (1, 2) or self.local_crops < 0:
            raise ValueError(
                f"crops={self.crops}, local_crops={self.local_crops}: want 1 or 2 "
                "crops and at least 0 local ones"
            )
        self.randaugment.check_channels(self.source.channels)
        tops = {"crop_scale": 1.0, "local_scale": 1.0, "crop_ratio": float("inf")}
        for name, top in tops.items():
            pair = getattr(self, name)
            if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= top:
                raise ValueError(f"{name}={pair}: want 0 < least <= greatest <= {top}")
        if not 0 < self.eval_crop_fraction <= 1:
            raise ValueError(
                f"eval_crop_fraction={self.eval_crop_fraction}: want 0 < it <= 1"
            )

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
