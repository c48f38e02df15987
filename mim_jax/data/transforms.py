# SPDX-License-Identifier: Apache-2.0
"""Host-side image transforms: decode, crop, resize, flip. Pillow and numpy alone."""

import io
import math

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image

# EXIF orientation: what brings the stored picture upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Undecodable(ValueError):
    """The bytes of a record are not a sound image."""


def decode(
    image: bytes | np.ndarray, channels: int
) -> UInt8[np.ndarray, "h w {channels}"]:
    """An encoded image, or one that is an array already, as 8-bit pixels.

    EXIF orientation is applied. Grey is replicated to colour, colour becomes luma
    (ITU-R 601) when one channel is asked for, CMYK becomes RGB, and transparent pixels
    are laid over white. 16-bit grey is divided by 257; of 16-bit colour Pillow keeps
    the high byte. The first frame of an animation is taken.

    Args:
        image: the bytes of a file, or uint8 pixels: rows, columns, channels.
        channels: 1 or 3; an array may have any number if it is the one asked for.
    Raises:
        Undecodable: the bytes are not a sound image.
        ValueError: the pixels cannot be brought to that many channels.
    """
    if isinstance(image, np.ndarray):
        return _array(image, channels)
    if channels not in (1, 3):
        raise ValueError(f"channels={channels}: an encoded image has 1 or 3")
    file = io.BytesIO(image)
    try:
        picture = Image.open(file)
        picture.load()
    except Exception as error:  # of any type: Pillow's parsers let all through
        raise Undecodable(f"{type(error).__name__}: {error}") from error
    picture = _upright(picture)
    if picture.mode == "F":
        raise Undecodable(
            "pixels are floats of unknown range; want an 8 or 16-bit file"
        )
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        grey = np.asarray(picture).astype(np.float64) / 257
        picture = Image.fromarray(np.clip(np.round(grey), 0, 255).astype(np.uint8))
    elif picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    if picture.mode == "LAB":  # Pillow goes from it to RGB alone
        picture = picture.convert("RGB")
    pixels = np.array(picture.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels)


def _array(image: np.ndarray, channels: int) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim != 3:
        raise ValueError(
            f"image is {image.dtype}{list(image.shape)}: want uint8, rows, columns and"
            " channels"
        )
    if image.shape[2] == channels:
        return image
    if image.shape[2] == 1:
        return np.repeat(image, channels, axis=2)
    if image.shape[2] == 3 and channels == 1:
        return np.asarray(Image.fromarray(image).convert("L"))[..., None]
    raise ValueError(f"image has {image.shape[2]} channels: cannot make {channels}")


def _upright(picture: Image.Image) -> Image.Image:
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a broken tag is no reason to lose the picture
        return picture
    method = _UPRIGHT.get(orientation)
    return picture if method is None else picture.transpose(method)


def sample_box(
    shape: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
    retry: bool = True,
) -> tuple[int, int, int, int]:
    """A random box of an image: top, left, rows, columns.

    Ten tries: a share of the area uniform in `scale`, a ratio of width to height
    log-uniform in `ratio`, and a place uniform among those where the box lies inside.
    If none fits, the largest central box whose ratio is in range. This is the
    documented behaviour of RandomResizedCrop in torchvision.

    Args:
        shape: rows and columns of the image.
        scale: least and greatest share of its area, within (0, 1].
        ratio: least and greatest width divided by height.
        retry: False: one try, its sides cut to those of the image (BYOL's crop, which
            MAE's linear probe uses).
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


def resize(
    image: UInt8[np.ndarray, "h w c"], size: tuple[int, int]
) -> UInt8[np.ndarray, "{size[0]} {size[1]} c"]:
    """Bicubic resize to `size` rows and columns; antialiased when it shrinks."""
    if image.shape[:2] == tuple(size):
        return image
    if image.shape[2] == 3:
        return np.asarray(_resized(image, size))
    # Channel by channel: Pillow would take four channels for colour and alpha.
    planes = [_resized(image[..., c], size) for c in range(image.shape[2])]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)


def _resized(pixels: np.ndarray, size: tuple[int, int]) -> Image.Image:
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    return picture.resize((size[1], size[0]), Image.Resampling.BICUBIC)


def random_resized_crop(
    image: UInt8[np.ndarray, "h w c"],
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
    retry: bool = True,
) -> UInt8[np.ndarray, "{size[0]} {size[1]} c"]:
    """A random box of the image (`sample_box`), resized to `size` rows and columns.

    Pixels outside the box do not enter: it is cut out before it is resized.
    """
    top, left, rows, cols = sample_box(image.shape[:2], scale, ratio, rng, retry)
    return resize(image[top : top + rows, left : left + cols], size)


def flip(
    image: UInt8[np.ndarray, "h w c"], rng: np.random.Generator
) -> UInt8[np.ndarray, "h w c"]:
    """The image, mirrored left to right in one case of two."""
    return image[:, ::-1] if rng.random() < 0.5 else image


def centre_crop(
    image: UInt8[np.ndarray, "h w c"], size: tuple[int, int], fraction: float
) -> UInt8[np.ndarray, "{size[0]} {size[1]} c"]:
    """The centre of the image, for evaluation.

    The image is resized, its proportions kept, until it just covers `size / fraction`
    (224 / 0.875 = 256: short side 256 for a square of 224); the centre is cut out.

    Args:
        size: rows and columns of the result.
        fraction: within (0, 1]; share of the tighter side that is kept.
    """
    rows, cols = image.shape[:2]
    zoom = max(size[0] / rows, size[1] / cols) / fraction
    whole = (max(size[0], round(rows * zoom)), max(size[1], round(cols * zoom)))
    image = resize(image, whole)
    top, left = (whole[0] - size[0]) // 2, (whole[1] - size[1]) // 2
    return image[top : top + size[0], left : left + size[1]]
