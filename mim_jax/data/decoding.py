# SPDX-License-Identifier: Apache-2.0
"""From the bytes of an image file to 8-bit pixels.

simplejpeg decodes sound JPEGs and Pillow everything else. Both give the same pixels of
a JPEG, but Pillow stores four bytes for a pixel of three and copies them twice.
"""

import io
import math
import warnings
from collections.abc import Callable

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

# EXIF orientation: what turns the stored pixels upright.
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
_MARKS = b"Exif\0", b"http://ns.adobe.com/xap"  # of segments that give an orientation
# What Pillow may decode. Not all that it could: for EPS it starts Ghostscript, which
# runs the program that such a file is.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# Pillow warns of images that `decode` refuses, once in every process.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
# Colour spaces of a JPEG that simplejpeg converts to so many channels.
_DIRECT = {1: ("Gray",), 3: ("Gray", "YCbCr", "RGB")}


class Undecodable(ValueError):
    """A record cannot be read, or its bytes are not a sound image."""


def decode(
    image: bytes | np.ndarray,
    channels: int,
    suffices: Callable[[tuple[int, int]], bool] | None = None,
) -> UInt8[np.ndarray, "h w {channels}"]:
    """An encoded image, or one that is an array already, as 8-bit pixels.

    EXIF orientation is applied. Grey is replicated to colour, colour becomes luma
    (ITU-R 601) when one channel is asked for, CMYK becomes RGB, and transparent pixels
    are laid over white. 16-bit grey is divided by 257; Pillow keeps the high byte of
    16-bit colour. An animation gives its first frame. A file whose header announces
    more than `PIL.Image.MAX_IMAGE_PIXELS` pixels (89 million) is not decoded: a few
    kilobytes can unpack to gigabytes. The content says what a file is, not its name,
    and only formats that Pillow decodes itself are read: for others it starts programs.

    Args:
        image: the bytes of a file, or uint8 pixels: rows, columns, channels.
        channels: 1 or 3; an array may have any number if it is the one asked for.
        suffices: tells whether an image of so many rows and columns would be large
            enough. If so, a JPEG is decoded to a half, a quarter or an eighth of its
            size, rounded up, which is faster: its blocks of 8 x 8 pixels become
            smaller ones.
    Raises:
        Undecodable: the bytes are not a sound image, or one of too many pixels.
        ValueError: the pixels cannot be brought to that many channels.

    Example:
        >>> decode(np.zeros((5, 7, 1), np.uint8), channels=3).shape
        (5, 7, 3)
    """
    if isinstance(image, np.ndarray):
        return _array(image, channels)
    if channels not in (1, 3):
        raise ValueError(f"channels={channels}: an encoded image has 1 or 3")
    pixels = _decode_jpeg(image, channels, suffices)
    if pixels is not None:
        return pixels
    try:
        picture = Image.open(io.BytesIO(image), formats=_FORMATS)
        if math.prod(picture.size) > _most_pixels():
            raise Undecodable(
                f"{picture.size[0]} x {picture.size[1]} pixels: want at most "
                f"{_most_pixels()} in all"
            )
        picture.load()
        return _UPRIGHT[_orientation(picture)](_pixels(picture, channels))
    except Undecodable:
        raise
    except UnidentifiedImageError as error:
        raise Undecodable(f"no image of a format of {', '.join(_FORMATS)}") from error
    except Exception as error:  # of any type: Pillow's parsers let all through
        raise Undecodable(f"{type(error).__name__}: {error}") from error


def _most_pixels() -> int | float:
    return Image.MAX_IMAGE_PIXELS or math.inf


def _decode_jpeg(
    image: bytes, channels: int, suffices: Callable[[tuple[int, int]], bool] | None
) -> np.ndarray | None:
    """Pixels of a JPEG; None if Pillow has to decode or to refuse the bytes."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(image)
    except ValueError:
        return None
    shape = int(height), int(width)
    if colours not in _DIRECT[channels] or math.prod(shape) > _most_pixels():
        return None
    orientation, head = 1, _head(image)
    if any(mark in head for mark in _MARKS):
        try:
            picture = Image.open(io.BytesIO(image), formats=("JPEG",))
            orientation = _orientation(picture)
        except Exception:  # `decode` meets the same error and reports it
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
    except ValueError:  # at any warning; Pillow decodes some damaged files
        return None
    return _UPRIGHT[orientation](pixels)


def _head(jpeg: bytes) -> bytes:
    """The segments before the first scan, or all bytes if a segment is broken."""
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
        if picture.mode == "La":  # Pillow converts it to nothing else
            picture = picture.convert("LA")
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    if picture.mode == "LAB":  # Pillow converts it to nothing but RGB
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
