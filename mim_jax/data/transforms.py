# SPDX-License-Identifier: Apache-2.0
"""Host-side image transforms: decode, crop, resize, flip.

Sound JPEGs are decoded by simplejpeg and everything else by Pillow, whose pixels of a
JPEG are the same: it keeps four bytes for a pixel of three, and copies them twice.
"""

import io
import math
from collections.abc import Callable

import cykooz_resizer
import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import ExifTags, Image

# EXIF orientation: what brings the stored pixels upright.
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}
_MARKS = b"Exif\0", b"http://ns.adobe.com/xap"  # of what may tell the orientation
# Colours of a JPEG that need no conversion but its own.
_DIRECT = {1: ("Gray",), 3: ("Gray", "YCbCr", "RGB")}
# Pillow's BICUBIC has the same kernel, -1/2 at its lowest.
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


class Undecodable(ValueError):
    """The bytes of a record are not a sound image."""


def decode(
    image: bytes | np.ndarray,
    channels: int,
    suffices: Callable[[tuple[int, int]], bool] | None = None,
) -> UInt8[np.ndarray, "h w {channels}"]:
    """An encoded image, or one that is an array already, as 8-bit pixels.

    EXIF orientation is applied. Grey is replicated to colour, colour becomes luma
    (ITU-R 601) when one channel is asked for, CMYK becomes RGB, and transparent pixels
    are laid over white. 16-bit grey is divided by 257; of 16-bit colour Pillow keeps
    the high byte. The first frame of an animation is taken.

    Args:
        image: the bytes of a file, or uint8 pixels: rows, columns, channels.
        channels: 1 or 3; an array may have any number if it is the one asked for.
        suffices: says of rows and columns whether an image of that size would do. If
            so, a JPEG comes at a half, a quarter or an eighth of its size, rounded up,
            which is faster: its blocks of 8 x 8 pixels are decoded to smaller ones.
    Raises:
        Undecodable: the bytes are not a sound image.
        ValueError: the pixels cannot be brought to that many channels.
    """
    if isinstance(image, np.ndarray):
        return _array(image, channels)
    if channels not in (1, 3):
        raise ValueError(f"channels={channels}: an encoded image has 1 or 3")
    pixels = _decode_jpeg(image, channels, suffices)
    if pixels is not None:
        return pixels
    try:
        picture = Image.open(io.BytesIO(image))
        picture.load()
    except Exception as error:  # of any type: Pillow's parsers let all through
        raise Undecodable(f"{type(error).__name__}: {error}") from error
    return _UPRIGHT[_orientation(picture)](_pixels(picture, channels))


def _decode_jpeg(
    image: bytes, channels: int, suffices: Callable[[tuple[int, int]], bool] | None
) -> np.ndarray | None:
    """Pixels of a JPEG; None if this is something else, or for Pillow to judge."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(image)
    except ValueError:
        return None
    shape = int(height), int(width)
    most = Image.MAX_IMAGE_PIXELS or math.inf  # of more, Pillow warns
    if colours not in _DIRECT[channels] or math.prod(shape) > most:
        return None
    orientation, head = 1, _head(image)
    if any(mark in head for mark in _MARKS):
        try:
            orientation = _orientation(Image.open(io.BytesIO(image)))
        except Exception:  # to be raised again, in one place
            return None
    size, factor = shape, 1
    while suffices is not None and factor < 8:
        half = -(-shape[0] // (2 * factor)), -(-shape[1] // (2 * factor))
        if not suffices(half if orientation < 5 else (half[1], half[0])):
            break
        size, factor = half, 2 * factor
    try:
        pixels = simplejpeg.decode_jpeg(
            image,
            "RGB" if channels == 3 else "GRAY",
            min_height=size[0],
            min_width=size[1],
        )
    except ValueError:  # at any warning: of the damage that there is, Pillow bears some
        return None
    return _UPRIGHT[orientation](pixels)


def _head(jpeg: bytes) -> bytes:
    """The segments before the first scan; all where they cannot be followed."""
    place = 2
    while (marker := jpeg[place : place + 2]) != b"\xff\xda":
        length = int.from_bytes(jpeg[place + 2 : place + 4], "big")
        if marker[:1] != b"\xff" or length < 2:
            return jpeg
        place += 2 + length
    return jpeg[:place]


def _pixels(picture: Image.Image, channels: int) -> np.ndarray:
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


def _orientation(picture: Image.Image) -> int:
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a broken tag is no reason to lose the picture
        return 1
    return orientation if orientation in _UPRIGHT else 1


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


def least_box(
    shape: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[float, float]:
    """Rows and columns of which no box of `sample_box` has fewer, but for rounding."""
    rows, cols = shape
    area = rows * cols * scale[0]
    # Beside the boxes that fit, the central one that replaces them.
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
    # A resizer of its own for each call, for one cannot serve two threads.
    cykooz_resizer.Resizer().resize(source, resized, _BICUBIC)
    return np.frombuffer(resized.get_buffer(), np.uint8).reshape(*size, channels)


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
    if rng.random() >= 0.5:
        return image
    mirrored = np.empty_like(image)
    for channel in range(image.shape[2]):  # four times faster than pixel by pixel
        mirrored[..., channel] = image[:, ::-1, channel]
    return mirrored


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
