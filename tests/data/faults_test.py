# SPDX-License-Identifier: Apache-2.0
"""Records that cannot be read: each is caught, counted and named, and none takes more
memory than an image that can."""

import hashlib
import io
import os
import pathlib
import resource
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image
from records import join

from mim_jax.data import transforms
from mim_jax.data.decoding import Undecodable, decode
from mim_jax.data.input import Input
from mim_jax.data.passes import EvalPasses, SetPasses
from mim_jax.data.pipeline import eval_batches, train_batches, why_unreadable
from mim_jax.data.sets.base import Files
from mim_jax.data.sources.few import Few
from mim_jax.data.sources.folder import Folder


def folder_of(root: pathlib.Path, train: int = 12, val: int = 6) -> pathlib.Path:
    for split, count in (("train", train), ("val", val)):
        for name in "ab":
            (root / split / name).mkdir(parents=True)
            for i in range(count // 2):
                picture = Image.new("RGB", (9, 9), (10 * i, 0, 0))
                picture.save(root / split / name / f"{i}.png")
    return root


def input_of(root: pathlib.Path, **fields) -> Input:
    fields = dict(image_size=(4, 4), workers=0, threads=1) | fields
    return Input(source=Folder(path=str(root)), **fields)


# Files that vanish.


def test_a_file_that_vanishes_is_replaced_and_the_others_keep_their_numbers(tmp_path):
    data = input_of(folder_of(tmp_path))
    assert len(data.source) == 12
    before = [data.source.name_of(index) for index in range(12)]
    (tmp_path / "train" / "a" / "3.png").unlink()
    with train_batches(data, seed=0, batch_size=4, stop=6) as batches:
        got = join(batches)
    gone = before.index(str(tmp_path / "train" / "a" / "3.png"))
    np.testing.assert_array_equal(got["replaced"], got["index"] == gone)
    assert got["replaced"].sum() == 2
    assert why_unreadable(data, gone).startswith("FileNotFoundError: ")
    assert why_unreadable(data, gone - 1) == ""


def test_the_list_of_files_travels_to_workers(tmp_path):
    source = Folder(path=str(folder_of(tmp_path)))
    names = [source.name_of(index) for index in range(len(source))]
    (tmp_path / "train" / "a" / "0.png").unlink()
    (tmp_path / "train" / "c").mkdir()
    copy = object.__new__(Folder)
    copy.__dict__.update(source.__getstate__())  # as unpickling does
    assert [copy.name_of(index) for index in range(len(copy))] == names
    assert copy.classes == ("a", "b") and copy.fingerprint() == source.fingerprint()
    few = Few(source=source, ids=(3, 5))
    assert few.name_of(1) == names[5]


@pytest.mark.parametrize("below", [".", "train", "val"])
def test_the_top_of_a_disk_may_hold_images(tmp_path, below):
    """There the system keeps `lost+found`, which only it may list."""
    folder_of(tmp_path)
    root = tmp_path / "train" if below == "." else tmp_path
    before = Folder(path=str(root))
    (root / below / "lost+found").mkdir()
    now = Folder(path=str(root))
    assert now.classes == ("a", "b") and now.fingerprint() == before.fingerprint()
    assert now.held_out().fingerprint() == before.held_out().fingerprint()


def test_a_folder_that_may_not_be_listed_is_told(tmp_path, monkeypatch):
    folder_of(tmp_path)
    secret = tmp_path / "train" / "b" / "secret"
    secret.mkdir()
    scandir = os.scandir

    def guarded(folder):
        if pathlib.Path(folder) == secret:
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(PermissionError) as caught:
        Folder(path=str(tmp_path))
    assert str(caught.value) == (
        f"{secret} may not be listed: want permission to read it, or the folder moved "
        "away from the images"
    )


def test_in_evaluation_it_is_a_row_without_an_image(tmp_path):
    data = input_of(folder_of(tmp_path))
    held_out = data.source.held_out()
    assert len(held_out) == 6
    (tmp_path / "val" / "b" / "0.png").unlink()
    (tmp_path / "val" / "a" / "1.png").write_bytes(b"junk")
    with eval_batches(data, batch_size=4, source=held_out) as batches:
        got = join(batches)
    np.testing.assert_array_equal(got["valid"], [1, 0, 1, 0, 1, 1, 0, 0])
    np.testing.assert_array_equal(got["replaced"], [0, 1, 0, 1, 0, 0, 0, 0])
    # Of what vanished the label is unknown; of what is damaged it is not.
    np.testing.assert_array_equal(got["label"], [0, 0, 0, -1, 1, 1, -1, -1])
    np.testing.assert_array_equal(got["index"], [0, 1, 2, 3, 4, 5, -1, -1])


# Names.


def test_a_name_that_is_not_utf8_is_read_like_any_other(tmp_path):
    root = folder_of(tmp_path)
    odd = os.fsencode(str(root / "train")) + b"/caf\xe9"
    os.rename(os.fsencode(str(root / "train" / "b")), odd)
    os.rename(odd + b"/2.png", odd + b"/\xff.png")
    os.rename(str(root / "val" / "b"), os.fsencode(str(root / "val")) + b"/caf\xe9")
    data = input_of(root)
    with train_batches(data, seed=0, batch_size=4, stop=3) as batches:
        assert not join(batches)["replaced"].any()
    assert data.source.classes == ("a", "caf\ufffd")
    assert data.source.held_out().classes == data.source.classes
    names = [data.source.name_of(index) for index in range(12)]
    assert str(root / "train" / "caf\ufffd" / "\ufffd.png") in names
    "".join(names).encode()  # can be printed anywhere
    listed = [f"a/{i}.png 0".encode() for i in range(6)]
    listed += [b"caf\xe9/%d.png 1" % i for i in (0, 1, 3, 4, 5)] + [
        b"caf\xe9/\xff.png 1"
    ]
    digest = hashlib.sha256(b"\n".join(listed)).hexdigest()
    assert data.source.fingerprint()["files"] == digest


# Bytes.


def tiff(samples: np.ndarray, extra: int) -> bytes:
    """A TIFF of grey and alpha by the letter of the specification; Pillow cannot write
    associated alpha (ExtraSamples 1)."""
    rows, cols, count = samples.shape
    raw = samples.tobytes()
    tags = [
        *((256, 4, cols), (257, 4, rows), (258, 3, 8 | 8 << 16), (259, 3, 1)),
        *((262, 3, 1), (273, 4, 8), (277, 3, count), (278, 4, rows)),
        *((279, 4, len(raw)), (338, 3, extra)),
    ]
    directory = struct.pack("<H", len(tags))
    for tag, kind, value in tags:
        number = 2 if tag == 258 else 1
        directory += struct.pack("<HHII", tag, kind, number, value)
    head = struct.pack("<2sHI", b"II", 42, 8 + len(raw))
    return head + raw + directory + struct.pack("<I", 0)


@pytest.mark.parametrize("channels", [1, 3])
def test_associated_alpha_lies_over_white(channels):
    alpha = np.array([[0, 128], [200, 255]], np.uint8)
    grey = np.array([[0, 60], [200, 70]], np.uint8)  # multiplied by alpha already
    got = decode(tiff(np.stack([grey, alpha], axis=-1), extra=1), channels)
    want = grey.astype(int) + 255 - alpha
    assert np.abs(got - want[..., None]).max() <= 1 and got.shape[2] == channels


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF", "JPEG", "WEBP"])
def test_what_cannot_be_converted_is_undecodable_whatever_pillow_raises(
    kind, monkeypatch
):
    stream = io.BytesIO()
    Image.new("CMYK" if kind in ("TIFF", "JPEG") else "RGB", (3, 3)).save(stream, kind)

    def fails(*_, **__):
        raise KeyError("no such conversion")

    monkeypatch.setattr(Image.Image, "convert", fails)
    with pytest.raises(Undecodable, match="KeyError: 'no such conversion'"):
        decode(stream.getvalue(), 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_bomb_is_refused_by_its_header(kind, monkeypatch):
    stream = io.BytesIO()
    Image.new("L", (40, 50)).save(stream, kind)
    assert decode(stream.getvalue(), 1).shape == (50, 40, 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    assert decode(stream.getvalue(), 1).shape == (50, 40, 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1999)
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("it was decoded"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as the module sets it, and pytest does not
        with pytest.raises(Undecodable, match="40 x 50 pixels: want at most 1999"):
            decode(stream.getvalue(), 1)


# PostScript is a program; this one never ends.
ENDLESS_EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n%%EOF\n"
)


def test_no_image_starts_another_program(tmp_path, monkeypatch):
    mark, stand_in = tmp_path / "started", tmp_path / "gs"
    stand_in.write_text(f"#!/bin/sh\ntouch {mark}\n")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # ask again
    with pytest.raises(Undecodable) as caught:
        decode(ENDLESS_EPS, channels=3)
    assert not mark.exists()
    assert str(caught.value).startswith("no image of a format of AVIF, BMP, ")


@pytest.mark.parametrize(
    "kind", ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"]
)
def test_formats_are_known_by_their_content(kind):
    file = io.BytesIO()
    Image.new("RGB", (16, 9), (200, 100, 50)).save(file, format=kind)
    pixels = decode(file.getvalue(), channels=3)
    assert pixels.shape == (9, 16, 3)
    assert np.abs(pixels.astype(int) - (200, 100, 50)).max() < 12  # some lose a little


def test_a_bomb_of_kilobytes_takes_no_memory():
    # The header and the first bytes of 30,000 x 30,000 pixels.
    stream = io.BytesIO()
    Image.new("1", (30000, 8)).save(stream, "PNG")
    data = bytearray(stream.getvalue())
    data[20:24] = struct.pack(">I", 30000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    before = peak()
    with pytest.raises(Undecodable, match="900000000 pixels"):
        decode(bytes(data), 3)
    assert peak() - before < 100


def peak() -> float:
    """The most memory that this process ever had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# Shapes.


@pytest.mark.parametrize("shape", [(1, 20000), (20000, 1), (3, 5000)])
def test_a_panorama_takes_the_memory_of_what_is_shown_of_it(shape):
    pixels = np.full((*shape, 3), 77, np.uint8)
    before = peak()
    view = transforms.centre_view(shape, (224, 224), 0.875)
    got = view.image(pixels)
    assert peak() - before < 100
    assert got.shape == (224, 224, 3) and (got == 77).all()
    assert np.prod(view.resized) > 100 * 224 * 224


@pytest.mark.parametrize("shape", [(40, 900), (900, 40), (37, 1111)])
def test_what_is_shown_of_a_panorama_is_that_of_the_whole_resized(shape):
    """Against Pillow, which resizes the whole."""
    rows, cols = np.meshgrid(*map(np.arange, shape), indexing="ij")
    waves = [np.sin(rows / 9 + cols / 7 + phase) for phase in (0, 1, 2)]
    pixels = np.round(127 + 120 * np.stack(waves, axis=-1)).astype(np.uint8)
    view = transforms.centre_view(shape, (32, 30), 0.875)
    assert np.prod(view.resized) > 16 * 32 * 30
    picture = Image.fromarray(pixels)
    whole = picture.resize(view.resized[::-1], Image.Resampling.BICUBIC)
    top, left = view.corner
    want = np.asarray(whole)[top : top + 32, left : left + 30]
    assert np.abs(view.image(pixels).astype(int) - want).max() <= 2


# Evaluation sets.


def files_of(root: pathlib.Path, border: int = 0) -> Files:
    records = tuple((f"a/{i}.png", (0,)) for i in range(3))
    names = dict(classes=("a",), members=((0,),), model_classes=1)
    return Files(folder=root / "val", records=records, border=border, **names)


def test_images_of_a_set_that_cannot_be_read_are_counted(tmp_path):
    data = input_of(folder_of(tmp_path))
    (tmp_path / "val" / "a" / "1.png").unlink()
    Image.new("RGB", (4, 9)).save(tmp_path / "val" / "a" / "2.png")  # all of it border
    with SetPasses(data, files_of(tmp_path, border=2), 4).batches() as batches:
        (batch,) = batches
        np.testing.assert_array_equal(batch["valid"], [True, False, False, False])
        np.testing.assert_array_equal(batch["replaced"], [False, True, True, False])
        np.testing.assert_array_equal(batch["index"], [0, 1, 2, -1])


def test_a_set_of_which_nothing_can_be_read_is_refused_before_training(
    tmp_path, monkeypatch
):
    data = input_of(folder_of(tmp_path))
    built = files_of(tmp_path)
    table = {"mine": lambda *_: built}
    monkeypatch.setattr("mim_jax.data.passes.SETS", table)
    passes = EvalPasses(data)
    for name in ("0", "1"):  # one that is sound suffices
        (tmp_path / "val" / "a" / f"{name}.png").write_bytes(b"")
        assert passes.evaluation_set("mine").images is built
    (tmp_path / "val" / "a" / "2.png").unlink()
    with pytest.raises(ValueError, match="set 'mine': none of 21 images that were tri"):
        passes.evaluation_set("mine")


# Anything.


@pytest.mark.slow
def test_2000_damaged_files_are_images_or_undecodable(tmp_path):
    """Bytes flipped, cut, doubled and exchanged, in files of every kind."""
    rng, kinds = np.random.default_rng(0), ("PNG", "GIF", "BMP", "TIFF", "JPEG", "WEBP")
    pixels = rng.integers(0, 256, (40, 30, 3), np.uint8)
    sound = []
    for kind in kinds:
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, kind)
        sound.append(stream.getvalue())
    data, decoded = input_of(folder_of(tmp_path), image_size=(8, 8)), 0
    for number in range(2000):
        file = bytearray(sound[number % len(sound)])
        for _ in range(rng.integers(1, 6)):
            place = int(rng.integers(len(file)))
            change = rng.integers(4)
            if change == 0:
                file[place] ^= 1 << int(rng.integers(8))
            elif change == 1:
                del file[place : place + int(rng.integers(1, 40))]
            elif change == 2:
                file[place:place] = file[: int(rng.integers(1, 40))]
            else:
                file[place : place + 4] = rng.bytes(4)
        record = {"image": bytes(file), "label": 0}
        for method in (data.examples.evaluate, data.examples.train):
            more = (rng,) if method == data.examples.train else ()
            try:
                example = method(record, data, *more)
            except Undecodable:
                continue
            assert example["image"].shape == (8, 8, 3)
            decoded += 1
    assert 200 < decoded < 3800
