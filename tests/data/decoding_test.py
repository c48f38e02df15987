# SPDX-License-Identifier: Apache-2.0
"""Decoding against Pillow called directly, and against hand-made NumPy."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from mim_jax.data.decoding import Undecodable, decode
from mim_jax.data.sources.photos import Photos


def pattern(rows, cols, channels, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (rows, cols, channels), dtype=np.uint8)


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def smooth(rows, cols):
    """A colour image that JPEG changes by no more than a few levels."""
    y, x = np.mgrid[:rows, :cols]
    planes = [255 * y / rows, 255 * x / cols, 255 * (x + y) / (rows + cols)]
    return np.stack(planes, axis=-1).astype(np.uint8)


# By orientation, where stored pixel (r, c) lies in the upright picture of h rows and w
# columns. The comments name the sides that row 0 and column 0 show, as EXIF does.
ORIENTATIONS = {
    1: lambda r, c, h, w: (r, c),  # top, left
    2: lambda r, c, h, w: (r, w - 1 - c),  # top, right
    3: lambda r, c, h, w: (h - 1 - r, w - 1 - c),  # bottom, right
    4: lambda r, c, h, w: (h - 1 - r, c),  # bottom, left
    5: lambda r, c, h, w: (c, r),  # left, top
    6: lambda r, c, h, w: (c, w - 1 - r),  # right, top
    7: lambda r, c, h, w: (h - 1 - c, w - 1 - r),  # right, bottom
    8: lambda r, c, h, w: (h - 1 - c, r),  # left, bottom
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_orientation_is_applied(orientation):
    upright = pattern(5, 7, 3)
    shape = (5, 7) if orientation < 5 else (7, 5)
    stored = np.zeros((*shape, 3), np.uint8)
    for r, c in np.ndindex(shape):
        stored[r, c] = upright[ORIENTATIONS[orientation](r, c, 5, 7)]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(stored), exif=exif.tobytes())
    np.testing.assert_array_equal(decode(data, 3), upright)


def test_broken_exif_keeps_the_picture():
    image = pattern(4, 6, 3)
    for exif in (b"Exif\0\0no such header", b"Exif\0\0II*\0"):
        data = encoded(Image.fromarray(image), exif=exif)
        np.testing.assert_array_equal(decode(data, 3), image)


def test_cmyk_of_adobe_becomes_rgb():
    # Smooth, because JPEG is lossy: c, m, y ramps under a constant black.
    cmyk = np.concatenate([smooth(32, 48), np.full((32, 48, 1), 40, np.uint8)], axis=-1)
    picture = Image.frombytes("CMYK", (48, 32), cmyk.tobytes())
    data = encoded(picture, "JPEG", quality=100)
    assert b"Adobe" in data  # this marker says that values are stored inverted
    want = (255.0 - cmyk[..., :3]) * (255 - 40) / 255
    np.testing.assert_allclose(decode(data, 3), want, atol=6)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled(form):
    deep = np.arange(0, 65536, 101, dtype=np.uint16)[: 25 * 25].reshape(25, 25)
    data = encoded(Image.fromarray(deep), form)
    want = np.round(deep / 257).astype(np.uint8)[..., None]
    np.testing.assert_array_equal(decode(data, 1), want)
    np.testing.assert_array_equal(decode(data, 3), want.repeat(3, axis=2))


def test_16_bit_colour_keeps_the_high_byte():
    deep = np.random.default_rng(0).integers(0, 65536, (3, 4, 3), dtype=np.uint16)
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)

    def chunk(kind, body):
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    header = struct.pack(">IIBBBBB", 4, 3, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    data += chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    np.testing.assert_array_equal(decode(data, 3), (deep >> 8))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_lie_over_white(mode):
    image = pattern(6, 5, len(mode))
    colour, alpha = image[..., :-1].astype(float), image[..., -1:] / 255
    want = np.broadcast_to(colour * alpha + 255 * (1 - alpha), (6, 5, 3))
    got = decode(encoded(Image.fromarray(image)), 3)
    np.testing.assert_allclose(got, want, atol=1)


def test_palette_with_and_without_transparency():
    picture = Image.frombytes("P", (2, 1), b"\0\1")
    picture.putpalette([10, 20, 30, 40, 50, 60])
    assert decode(encoded(picture), 3).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    see_through = encoded(picture, transparency=1)
    assert decode(see_through, 3).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_grey_is_replicated_and_colour_becomes_luma():
    grey, colour = pattern(6, 5, 1), pattern(6, 5, 3)
    png = encoded(Image.fromarray(grey[..., 0]))
    np.testing.assert_array_equal(decode(png, 1), grey)
    np.testing.assert_array_equal(decode(png, 3), grey.repeat(3, axis=2))
    np.testing.assert_array_equal(decode(grey, 3), grey.repeat(3, axis=2))
    luma = colour @ [0.299, 0.587, 0.114]
    png = encoded(Image.fromarray(colour))
    np.testing.assert_allclose(decode(png, 1)[..., 0], luma, atol=1)
    np.testing.assert_allclose(decode(colour, 1)[..., 0], luma, atol=1)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
def test_arrays_pass_through(channels):
    image = pattern(4, 3, channels)
    assert decode(image, channels) is image


def test_what_cannot_be_asked_for():
    with pytest.raises(ValueError, match="channels=4.*1 or 3"):
        decode(b"", 4)
    with pytest.raises(ValueError, match="2 channels: cannot make 3"):
        decode(pattern(4, 3, 2), 3)
    with pytest.raises(ValueError, match="uint8"):
        decode(np.zeros((4, 3, 3), np.float32), 3)


SOUND = {
    form: encoded(Image.fromarray(smooth(24, 30)), form)
    for form in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP")
}


@pytest.mark.parametrize("form", SOUND)
def test_truncated_is_undecodable(form):
    for share in (0, 0.1, 0.6):
        data = SOUND[form][: int(share * len(SOUND[form]))]
        with pytest.raises(Undecodable):
            decode(data, 3)


def test_a_header_of_absurd_size_is_undecodable():
    data = bytearray(SOUND["BMP"])
    data[18:26] = b"\xff\xff\x00\x00" * 2  # columns and rows
    with pytest.raises(Undecodable, match="Bomb") as error:
        decode(bytes(data), 3)
    # Any error of Pillow's parsers counts, not only OSError, which it documents.
    assert isinstance(error.value.__cause__, Image.DecompressionBombError)


def test_floats_and_no_pictures_are_undecodable():
    floats = encoded(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF")
    for data in (floats, b"text, no picture", b""):
        with pytest.raises(Undecodable):
            decode(data, 3)


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "LAB", "RGBX"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_colour_space_is_converted(mode, channels):
    white = Image.new("RGB", (3, 2), "white")
    lab = [Image.new("L", (3, 2), value) for value in (255, 128, 128)]
    picture = Image.merge(mode, lab) if mode == "LAB" else white.convert(mode)
    form = "JPEG" if mode == "YCbCr" else "TIFF"
    image = decode(encoded(picture, form), channels)
    assert image.shape == (2, 3, channels)
    np.testing.assert_allclose(image, 255, atol=1)


@settings(max_examples=150, deadline=None)
@given(
    form=st.sampled_from(sorted(SOUND)),
    hits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6),
    end=st.floats(0.2, 1),
)
def test_damage_gives_an_image_or_undecodable(form, hits, end):
    data = bytearray(SOUND[form])
    for place, value in hits:
        data[int(place * (len(data) - 1))] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of some damage
        try:
            image = decode(bytes(data[: int(end * len(data))]), 3)
        except Undecodable:
            return
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3


def by_pillow(data, channels):
    """The pixels that Pillow alone decodes from a JPEG; None if it refuses."""
    try:
        picture = Image.open(io.BytesIO(data))
        picture.load()
    except Exception:
        return None
    picture = ImageOps.exif_transpose(picture).convert("RGB" if channels == 3 else "L")
    pixels = np.asarray(picture)
    return pixels.reshape(*pixels.shape[:2], channels)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        *({"subsampling": chroma} for chroma in ("4:4:4", "4:2:2", "4:2:0", "4:1:1")),
        {"progressive": True},
        {"quality": 20, "restart_marker_rows": 1},
        {"keep_rgb": True},
    ],
)
def test_jpegs_are_decoded_to_pillows_pixels(options, grey, channels):
    photograph = Photos()[0]["image"][:101, :167]  # no multiple of a block
    picture = Image.fromarray(photograph[..., 1] if grey else photograph)
    data = encoded(picture, "JPEG", **options)
    got = decode(data, channels)
    np.testing.assert_array_equal(got, by_pillow(data, channels))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_jpegs_are_turned_upright(orientation):
    picture, exif = Image.fromarray(smooth(40, 56)), Image.Exif()
    exif[0x0112] = orientation
    packet = f"""<x:xmpmeta xmlns:x="adobe:ns:meta/">
        <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
        <rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/">
        <tiff:Orientation>{orientation}</tiff:Orientation>
        </rdf:Description></rdf:RDF></x:xmpmeta>""".encode()
    # A segment before the tag whose bytes look like the first scan.
    comment = b"\xff\xfe\0\6\xff\xda\xff\xda"
    for options in ({"exif": exif.tobytes()}, {"xmp": packet}):
        data = encoded(picture, "JPEG", **options)
        data = data[:2] + comment + data[2:]
        got = decode(data, 3)
        np.testing.assert_array_equal(got, by_pillow(data, 3))
        assert got.shape == ((40, 56, 3) if orientation < 5 else (56, 40, 3))

        def wide(shape, turned=orientation > 4):
            return shape == ((28, 20) if turned else (20, 28))

        assert wide(decode(data, 3, wide).shape[:2])


@pytest.mark.parametrize("progressive", [False, True])
def test_damaged_jpegs_are_judged_by_pillow(progressive):
    photograph = Image.fromarray(Photos()[11]["image"]).resize((60, 45))
    sound = encoded(photograph, "JPEG", progressive=progressive, quality=85)
    rng, verdicts = np.random.default_rng(0), []
    for trial in range(600):
        data = bytearray(sound)
        for place in rng.integers(len(data), size=1 + trial % 3):
            data[place] = rng.integers(256)
        data = bytes(data[: rng.integers(len(data))] if trial % 4 == 3 else data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of some damage
            want = by_pillow(data, 3)
            try:
                got = decode(data, 3)
            except Undecodable:
                got = None
        assert (got is None) == (want is None)
        if want is not None:
            np.testing.assert_array_equal(got, want)
        verdicts.append(got is None)
    assert 0.1 < np.mean(verdicts) < 0.9


def test_a_jpeg_of_absurd_size_is_left_to_pillow(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 30 // 3)
    with pytest.raises(Undecodable, match="Bomb"):
        decode(SOUND["JPEG"], 3)


@pytest.mark.parametrize(
    ("least", "want"),
    [((94, 126), (94, 126)), ((95, 126), (187, 251)), ((1, 1), (24, 32))],
)
def test_jpegs_are_decoded_no_smaller_than_suffices(least, want):
    data = encoded(Image.fromarray(smooth(187, 251)), "JPEG")

    def suffices(shape):
        return shape[0] >= least[0] and shape[1] >= least[1]

    assert decode(data, 3, suffices).shape[:2] == want
    png = encoded(Image.fromarray(smooth(187, 251)))
    assert decode(png, 3, suffices).shape[:2] == (187, 251)
