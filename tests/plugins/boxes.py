# SPDX-License-Identifier: Apache-2.0
"""A source with boxes, examples that have them, and a masking that reads them.

PYTHONPATH=tests/plugins python -m mim_jax.main --plugins=boxes \
    --config=configs/mae.py:digits,source=rectangles,examples=boxes,masking=covered \
    --config.data.image_size='(32,32)' --config.objective.encoder.patch=4 \
    --workdir=runs/boxes
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax import config
from mim_jax.data.decoding import decode
from mim_jax.data.examples.base import Examples, common_fields
from mim_jax.data.fields import FieldSpec
from mim_jax.data.sources.base import Source, check_split
from mim_jax.maskings.base import Masking
from mim_jax.ops.masking import from_scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rectangles(Source):
    """Drawings of 48 x 48 pixels with one to three bright rectangles and their boxes.

    Attributes:
        images: number of images of the split.
        split: "train" or "held_out".
    """

    images: int = 500
    split: str = "train"

    def __post_init__(self):
        check_split(self.split)
        if self.images < 1:
            raise ValueError(f"images={self.images}: want at least 1")

    def __len__(self):
        return self.images

    def __getitem__(self, index):
        rng = np.random.default_rng([index, self.split == "train"])
        image = rng.integers(0, 40, (48, 48, 1), np.uint8)
        boxes = np.zeros((rng.integers(1, 4), 4), np.float32)
        for box in boxes:
            top, left = rng.integers(0, 32, 2)
            bottom, right = (top, left) + rng.integers(8, 17, 2)
            image[top:bottom, left:right] = rng.integers(120, 250)
            # As TFDS gives them: shares of rows and columns.
            box[:] = top / 48, left / 48, bottom / 48, right / 48
        return {"image": image, "label": -1, "boxes": boxes}

    @property
    def classes(self):
        return ()

    @property
    def channels(self):
        return 1

    def held_out(self):
        return dataclasses.replace(self, images=100, split="held_out")

    def fingerprint(self):
        return {"name": "rectangles", "split": self.split, "count": self.images}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Boxes(Examples):
    """A crop and the boxes in it: `boxes` float32 (most, 4) and `boxes_valid`.

    Attributes:
        most: boxes of an example; further ones are left out.
    """

    most: int = 4

    def fields(self, data):
        return common_fields(data) | {
            "boxes": FieldSpec((self.most, 4), np.float32, fill=-1.0),
            "boxes_valid": FieldSpec((self.most,), np.bool_),
        }

    eval_fields = fields

    def train(self, record, data, rng):
        pixels = decode(record["image"], data.source.channels, data.suffices)
        return self._shown(record, pixels, data.sample_view(pixels.shape[:2], rng))

    def evaluate(self, record, data):
        pixels = decode(record["image"], data.source.channels)
        return self._shown(record, pixels, data.centre_view(pixels.shape[:2]))

    def _shown(self, record, pixels, view):
        found = view.boxes(record["boxes"])  # cropped, resized, mirrored
        inside = (found[:, 2:] > found[:, :2]).all(axis=1)
        found = found[inside][: self.most]
        boxes = np.full((self.most, 4), -1, np.float32)
        boxes[: len(found)] = found
        return {
            "image": view.image(pixels),
            "label": np.int32(record["label"]),
            "boxes": boxes,
            "boxes_valid": np.arange(self.most) < len(found),
        }

    def advice(self, name):
        return "config.data.examples.most >= 1" if name.startswith("boxes") else ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Covered(Masking):
    """Hides the patches that boxes cover most; equal ones at random.

    Attributes:
        ratio: share of patches that is hidden, 0 < ratio < 1.
    """

    reads = ("boxes", "boxes_valid")

    ratio: float = 0.5

    def __post_init__(self):
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio={self.ratio}: want 0 < ratio < 1")

    def visible_count(self, grid):
        visible = int(grid.size * (1 - self.ratio) + 1e-6)
        if not 0 < visible < grid.size:
            raise ValueError(
                f"ratio={self.ratio} leaves {visible} of {grid.size} patches visible: "
                "want at least one visible and one hidden"
            )
        return visible

    def __call__(self, keys, grid, *, boxes, boxes_valid):
        down = _overlaps(boxes[:, :, 0], boxes[:, :, 2], grid.rows)
        across = _overlaps(boxes[:, :, 1], boxes[:, :, 3], grid.cols)
        shares = down[:, :, :, None] * across[:, :, None, :]
        shares = jnp.where(boxes_valid[:, :, None, None], shares, 0).max(axis=1)
        shares = shares.reshape(len(keys), grid.size)
        noise = jax.vmap(lambda key: jax.random.uniform(key, (grid.size,), "float32"))
        return from_scores(shares + 1e-3 * noise(keys), self.visible_count(grid))


def _overlaps(first, last, count):
    """Share of each of `count` equal intervals of 0..1 that lies in first..last:
    "b m" to "b m {count}"."""
    edges = jnp.asarray(np.arange(count + 1) / count, jnp.float32)[None, None]
    ends = jnp.minimum(last[:, :, None], edges[:, :, 1:])
    starts = jnp.maximum(first[:, :, None], edges[:, :, :-1])
    return count * jnp.maximum(ends - starts, 0)


config.register("rectangles", Rectangles)
config.register("boxes", Boxes)
config.register("covered", Covered)
