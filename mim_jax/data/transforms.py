# SPDX-License-Identifier: Apache-2.0
"""Which part of an image an example shows: crop, resize, mirror.

A `View` is such a part. It makes the pixels of the example, and moves boxes and masks
of the image to the same place.
"""

import dataclasses
import math

import cykooz_resizer
import numpy as np
from jaxtyping import Float, Shaped, UInt8
from PIL import Image

# Pillow's BICUBIC has the same kernel, with coefficient -1/2.
_BICUBIC = cykooz_resizer.ResizeOptions(
    cykooz_resizer.ResizeAlg.convolution(cykooz_resizer.FilterType.catmull_rom),
    use_alpha=False,
)
_PIXELS = {
    1: cykooz_resizer.PixelType.U8,
    2: cykooz_resizer.PixelType.U8x2,
    3: cykooz_resizer.PixelType.U8x3,
    4: cykooz_resizer.PixelType.U8x4,
}


# A resized box that is so many times larger than what is shown of it is not made in
# whole: that of a panorama of 20000 x 1 pixels would take gigabytes. For other images
# the pixels stay those of a resize and a cut, to the bit.
_LARGEST = 16


@dataclasses.dataclass(frozen=True)
class View:
    """A part of an image and its place in an example.

    The box is cut out of the image and resized to `resized`; of that, a window of
    `size` at `corner` is shown, mirrored left to right if `mirrored`.

    Attributes:
        shape: rows and columns of the image.
        box: top, left, rows and columns of the box, in pixels of the image.
        resized: rows and columns that the box is resized to.
        corner: top and left of the window in the resized box.
        size: rows and columns of the window, which is what the example shows.
        mirrored: whether left and right are exchanged.

    Example:
        >>> view = View((40, 80), (0, 40, 40, 40), (10, 10), (0, 0), (10, 10), True)
        >>> view.image(np.zeros((40, 80, 3), np.uint8)).shape
        (10, 10, 3)
        >>> view.boxes(np.array([[0.0, 0.5, 1.0, 0.75]]))  # the left half of the box
        array([[0. , 0.5, 1. , 1. ]])
    """

    shape: tuple[int, int]
    box: tuple[int, int, int, int]
    resized: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]
    mirrored: bool

    def image(
        self, pixels: UInt8[np.ndarray, "{self.shape[0]} {self.shape[1]} c"]
    ) -> UInt8[np.ndarray, "{self.size[0]} {self.size[1]} c"]:
        """The pixels that the example shows.

        Pixels outside the box have no influence: it is cut out before it is resized.
        """
        top, left, rows, cols = self.box
        cut = pixels[top : top + rows, left : left + cols]
        if math.prod(self.resized) > _LARGEST * math.prod(self.size):
            shown = resize_part(cut, self.size, self._window)
        else:
            top, left = self.corner
            whole = resize(cut, self.resized)
            shown = whole[top : top + self.size[0], left : left + self.size[1]]
        return mirror(shown) if self.mirrored else shown

    def boxes(self, boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n 4"]:
        """Boxes of the image as boxes of the example, cut to what it shows.

        Shares of the sides do not change when a JPEG is decoded to a part of its size.

        Args:
            boxes: top, left, bottom and right as shares 0..1 of the image's rows and
                columns, as TFDS gives them.
        Returns:
            The same as shares of the example. A box that lies outside has no area: its
            bottom equals its top, or its right its left.
        Raises:
            ValueError: a number is far from 0..1, as those of pixels are, or NaN.
        """
        if not ((boxes > -0.01) & (boxes < 1.01)).all():
            raise ValueError(
                f"boxes from {boxes.min()} to {boxes.max()}: want top, left, bottom, "
                "right as shares 0..1 of the image's rows and columns, which pixels "
                "become when they are divided by these"
            )
        edges = np.reshape(boxes, (-1, 2, 2)).astype(np.float64)  # n, corner, axis
        edges = (edges * self.shape - self.box[:2]) * self._zoom - self.corner
        edges = np.clip(edges / self.size, 0, 1)
        if self.mirrored:
            edges[..., 1] = 1 - edges[:, ::-1, 1]
        return edges.reshape(-1, 4).astype(boxes.dtype)

    def masks(
        self, masks: Shaped[np.ndarray, "n h w"]
    ) -> Shaped[np.ndarray, "n {self.size[0]} {self.size[1]}"]:
        """Masks or label maps of the image as the example shows them.

        Args:
            masks: each covers the whole image, at its own or at any other resolution.
        Returns:
            The nearest value at the centre of each pixel of the example.
        """
        places = []
        for axis in range(2):
            centres = np.arange(self.size[axis]) + self.corner[axis] + 0.5
            in_image = self.box[axis] + centres / self._zoom[axis]
            count = masks.shape[1 + axis]
            place = np.floor(in_image * (count / self.shape[axis])).astype(np.int64)
            places.append(np.clip(place, 0, count - 1))
        rows, cols = places
        return masks[:, rows[:, None], cols[::-1] if self.mirrored else cols]

    @property
    def _window(self) -> tuple[float, float, float, float]:
        """Top, left, rows and columns of what is shown, in pixels of the box."""
        starts, sides = [], []
        for axis in range(2):
            zoom, side = self._zoom[axis], self.box[2 + axis]
            starts.append(min(self.corner[axis] / zoom, side))
            sides.append(min(self.size[axis] / zoom, side - starts[-1]))
        return (*starts, *sides)

    @property
    def _zoom(self) -> tuple[float, float]:
        """Pixels of the example per pixel of the image, along rows and columns."""
        return self.resized[0] / self.box[2], self.resized[1] / self.box[3]


def sample_view(
    shape: tuple[int, int],
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
    *,
    retry: bool = True,
    flip: bool = False,
) -> View:
    """A random view: the box of `sample_box`, resized to `size`.

    Args:
        shape: rows and columns of the image.
        size: rows and columns of the view.
        scale, ratio, retry: see `sample_box`.
        flip: mirror one view of two.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> view = sample_view((30, 40), (8, 8), (0.2, 1.0), (0.75, 1.33), rng)
        >>> view.image(np.zeros((30, 40, 3), np.uint8)).shape
        (8, 8, 3)
    """
    box = sample_box(shape, scale, ratio, rng, retry)
    mirrored = bool(flip and rng.random() < 0.5)
    return View(shape, box, size, (0, 0), size, mirrored)


def centre_view(shape: tuple[int, int], size: tuple[int, int], fraction: float) -> View:
    """The centre of an image, for evaluation, placed as by torchvision's `Resize` and
    `CenterCrop`.

    The image is resized in proportion until it just covers `size / fraction`
    (224 / 0.875 = 256: the short side becomes 256 for a square of 224); the longer side
    is rounded down to whole pixels. The view is the centre of that. Where half a pixel
    is left over, the view begins at the even one of the two nearest pixels.

    Args:
        shape: rows and columns of the image.
        size: rows and columns of the view.
        fraction: within (0, 1]; the share that the view has of the tighter side.
    """
    rows, cols = shape
    if size[0] * cols >= size[1] * rows:  # rows fit exactly, columns are left over
        fitted = round(size[0] / fraction)
        resized = fitted, fitted * cols // rows
    else:
        fitted = round(size[1] / fraction)
        resized = fitted * rows // cols, fitted
    corner = round((resized[0] - size[0]) / 2), round((resized[1] - size[1]) / 2)
    return View(shape, (0, 0, rows, cols), resized, corner, size, mirrored=False)


def centre_crop(
    image: UInt8[np.ndarray, "h w c"], size: tuple[int, int], fraction: float
) -> UInt8[np.ndarray, "{size[0]} {size[1]} c"]:
    """The pixels of `centre_view`.

    Example:
        >>> centre_crop(np.zeros((30, 40, 3), np.uint8), (8, 8), 0.875).shape
        (8, 8, 3)
    """
    rows, cols = image.shape[:2]
    return centre_view((rows, cols), size, fraction).image(image)


def sample_box(
    shape: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
    retry: bool = True,
) -> tuple[int, int, int, int]:
    """A random box of an image: top, left, rows, columns.

    Up to ten tries. Each draws a share of the area, uniform in `scale`, a ratio of
    width to height, log-uniform in `ratio`, and a place, uniform among those where the
    box lies inside the image. If no try fits, the box is the largest central one whose
    ratio is in range. RandomResizedCrop of torchvision documents the same behaviour.

    Args:
        shape: rows and columns of the image.
        scale: least and greatest share of its area, within (0, 1].
        ratio: least and greatest width divided by height.
        retry: False: one try, its sides cut to those of the image. This is BYOL's
            crop, which MAE's linear probe uses.
    """
    rows, cols = shape
    for _ in range(10):
        area = rows * cols * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not retry:
            width, height = min(max(width, 1), cols), min(max(height, 1), rows)
        if 0 < height <= rows and 0 < width <= cols:
            top = int(rng.integers(rows - height + 1))
            left = int(rng.integers(cols - width + 1))
            return top, left, height, width
    aspect = min(max(cols / rows, ratio[0]), ratio[1])
    height = min(rows, max(1, round(cols / aspect)))
    width = min(cols, max(1, round(rows * aspect)))
    return (rows - height) // 2, (cols - width) // 2, height, width


def least_box(
    shape: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[float, float]:
    """The least rows and columns that a box of `sample_box` can have, before it rounds
    them."""
    rows, cols = shape
    area = rows * cols * scale[0]
    # The least of a sampled box and of the central one that stands in for it.
    height = min(math.sqrt(area / ratio[1]), rows, cols / ratio[0])
    width = min(math.sqrt(area * ratio[0]), cols, rows * ratio[1])
    return float(height), float(width)


def resize(
    image: UInt8[np.ndarray, "h w c"], size: tuple[int, int]
) -> UInt8[np.ndarray, "{size[0]} {size[1]} c"]:
    """Bicubic resize to `size` rows and columns; antialiased when it shrinks."""
    if image.shape[:2] == tuple(size):
        return image
    rows, cols, channels = image.shape
    if channels not in _PIXELS:
        planes = [resize(image[..., c : c + 1], size) for c in range(channels)]
        return np.concatenate(planes, axis=-1)
    kind = _PIXELS[channels]
    source = cykooz_resizer.ImageData(cols, rows, kind, image.tobytes())
    resized = cykooz_resizer.ImageData(size[1], size[0], kind)
    # A new resizer for each call: two threads cannot share one.
    cykooz_resizer.Resizer().resize(source, resized, _BICUBIC)
    return np.frombuffer(resized.get_buffer(), np.uint8).reshape(*size, channels)


def resize_part(
    image: UInt8[np.ndarray, "h w c"],
    size: tuple[int, int],
    part: tuple[float, float, float, float],
) -> UInt8[np.ndarray, "{size[0]} {size[1]} c"]:
    """A part of an image as `resize` resizes it, up to rounding.

    Args:
        part: top, left, rows and columns in pixels, which may be fractions.
    """
    top, left, rows, cols = part
    box = left, top, left + cols, top + rows
    planes = [
        # Not the parts of cykooz_resizer, which reads beyond the ends of an image.
        Image.fromarray(np.ascontiguousarray(image[..., channel])).resize(
            (size[1], size[0]), Image.Resampling.BICUBIC, box
        )
        for channel in range(image.shape[2])
    ]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)


def mirror(image: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w c"]:
    """The image with left and right exchanged."""
    mirrored = np.empty_like(image)
    for channel in range(image.shape[2]):  # four times faster than pixel by pixel
        mirrored[..., channel] = image[:, ::-1, channel]
    return mirrored
