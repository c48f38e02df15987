# SPDX-License-Identifier: Apache-2.0
"""Makes tests/data/jpegs, the prepared data set of small JPEGs that the tests read.

    python tests/data/make_jpegs.py [OUT]

It needs pip install -e '.[prepare]'. The crops come from the embedded photographs;
made with tensorflow-datasets 4.9.10, tensorflow 2.21.0, pillow 13.0.0.
"""

import pathlib
import shutil
import sys
import tempfile

from PIL import Image

from mim_jax.data import prepare
from mim_jax.data.sources import photos

OUT = pathlib.Path(__file__).parent / "jpegs"
NAME = "small_jpegs"

# Class: the crops of each file as left, top, width, height. Textures are grey files.
CROPS = {
    "made": (
        ("skimage/data/motorcycle_left.png", (40, 120, 320, 240)),
        ("skimage/data/motorcycle_left.png", (360, 180, 240, 240)),
        ("skimage/data/coffee.png", (150, 60, 280, 280)),
        ("skimage/data/rocket.jpg", (220, 20, 200, 300)),
        ("sklearn/datasets/images/china.jpg", (80, 60, 240, 200)),
        ("skimage/data/rocket.jpg", (60, 200, 220, 220)),
        ("skimage/data/coffee.png", (360, 100, 200, 200)),
        ("sklearn/datasets/images/china.jpg", (120, 160, 240, 240)),
    ),
    "nature": (
        ("skimage/data/chelsea.png", (60, 20, 260, 260)),
        ("skimage/data/chelsea.png", (180, 60, 200, 160)),
        ("sklearn/datasets/images/flower.jpg", (180, 80, 260, 260)),
        ("sklearn/datasets/images/flower.jpg", (60, 40, 300, 220)),
        ("skimage/data/hubble_deep_field.jpg", (420, 300, 240, 240)),
        ("skimage/data/chelsea.png", (20, 100, 240, 180)),
        ("sklearn/datasets/images/flower.jpg", (260, 140, 200, 280)),
    ),
    "texture": (
        ("skimage/data/brick.png", (0, 0, 256, 256)),
        ("skimage/data/grass.png", (0, 0, 256, 256)),
        ("skimage/data/gravel.png", (0, 0, 256, 192)),
        ("skimage/data/brick.png", (200, 256, 192, 256)),
        ("skimage/data/gravel.png", (256, 256, 256, 256)),
    ),
}


def write_crops(folder: pathlib.Path) -> None:
    """Writes the crops as JPEGs, their long side 96 pixels, one folder per class."""
    for label, crops in CROPS.items():
        for number, (name, (left, top, width, height)) in enumerate(crops):
            image = Image.open(photos.locate(name))
            image = image.crop((left, top, left + width, top + height))
            image.thumbnail((96, 96), Image.Resampling.BICUBIC)
            path = folder / "train" / label / f"{number:02}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, quality=85)


def make(out: pathlib.Path) -> pathlib.Path:
    """Prepares the crops under `out`, emptied first; returns the version's folder."""
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as crops:
        write_crops(pathlib.Path(crops))
        return prepare.folder(path=crops, name=NAME, data_dir=str(out))


if __name__ == "__main__":
    print(make(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else OUT))
