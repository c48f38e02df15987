# SPDX-License-Identifier: Apache-2.0
"""The photographs that scikit-image and scikit-learn ship."""

import dataclasses
import functools
from typing import Any

import numpy as np
from PIL import Image

from mim_jax.data.sources.base import Source, check_split
from mim_jax.data.sources.packaged import locate

# Every photograph of at least 300 pixels in the wheels of scikit-image 0.24 to 0.26 and
# scikit-learn 1.5 to 1.9, which all have the same files. Not listed: pages and text,
# drawings, colour charts, logos, computed images, other file formats.
TRAIN = (
    "skimage/data/astronaut.png",
    "skimage/data/brick.png",  # grey
    "skimage/data/camera.png",  # grey
    "skimage/data/coins.png",  # grey
    "skimage/data/grass.png",  # grey
    "skimage/data/gravel.png",  # grey
    "skimage/data/hubble_deep_field.jpg",
    "skimage/data/moon.png",  # grey
    "skimage/data/motorcycle_left.png",  # a stereo pair: both in this split
    "skimage/data/motorcycle_right.png",
    "skimage/data/retina.jpg",
    "sklearn/datasets/images/china.jpg",
)
HELD_OUT = (
    "skimage/data/chelsea.png",  # a cat
    "skimage/data/coffee.png",
    "skimage/data/ihc.png",  # stained tissue under a microscope
    "skimage/data/rocket.jpg",  # at night
    "sklearn/datasets/images/flower.jpg",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Photos(Source):
    """Real photographs without a download; grey ones are replicated to colour."""

    split: str = "train"  # "train" | "held_out"

    def __post_init__(self):
        check_split(self.split)
        for name in self.files:
            locate(name)

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files, record by record."""
        return TRAIN if self.split == "train" else HELD_OUT

    @functools.cached_property
    def _images(self) -> tuple[np.ndarray, ...]:
        # About 20 MB decoded, held so that reading a record decodes nothing.
        images = tuple(
            np.array(Image.open(locate(name)).convert("RGB")) for name in self.files
        )
        for image in images:
            image.flags.writeable = False  # shared by every reader
        return images

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._images[index], "label": -1}

    @property
    def classes(self) -> tuple[str, ...]:
        return ()

    @property
    def channels(self) -> int:
        return 3

    def held_out(self) -> "Photos":
        return dataclasses.replace(self, split="held_out")

    def fingerprint(self) -> dict[str, Any]:
        return {
            "name": "photos",
            "split": self.split,
            "count": len(self),
            "files": list(self.files),
        }
