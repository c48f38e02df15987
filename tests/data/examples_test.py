# SPDX-License-Identifier: Apache-2.0
"""Every way to make examples keeps the contract, and another one is easy to add."""

import dataclasses
import io
import pickle

import numpy as np
import pytest
from PIL import Image
from records import Numbered, assert_same, join

from mim_jax.data.decoding import decode
from mim_jax.data.examples import EXAMPLES
from mim_jax.data.examples.base import Examples, common_fields
from mim_jax.data.examples.regions import Regions
from mim_jax.data.fields import FieldSpec
from mim_jax.data.input import Input
from mim_jax.data.pipeline import EVAL_ROW, eval_batches, train_batches
from mim_jax.data.sources.digits import Digits
from mim_jax.data.sources.few import Few
from mim_jax.data.sources.scenes import Scenes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Annotated(Numbered):
    """Numbered images with a further array and a second label."""

    count: int = 20
    bad: tuple[int, ...] = (3, 11)

    def fields(self):
        return {
            "latents": FieldSpec((2, 3), np.float32, fill=-7.0),
            "second_label": FieldSpec((), np.int32, fill=-1),
        }

    def __getitem__(self, index):
        return super().__getitem__(index) | {
            "latents": np.full((2, 3), index, np.float32),
            "second_label": np.int32(index % 5),
            "name": f"record {index}",  # of no fixed shape: examples may read it
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Framed(Annotated):
    """Numbered images with one object that fills them."""

    def fields(self):
        return {}

    def __getitem__(self, index):
        return super().__getitem__(index) | {
            "boxes": np.array([[0, 0, 4, 4]], np.float32),
            "classes": np.zeros(1, np.int32),
            "crowd": np.zeros(1, bool),
            "areas": np.full(1, 16.0),
            "segments": [None],
            "ids": [index],
        }


# By name in EXAMPLES, the fields of the inputs to test with, where the default input is
# not enough.
ROWS: dict[str, list[dict]] = {
    "crops": [
        {},
        {"crops": 2, "local_crops": 2, "local_size": (2, 3)},
        {"source": Digits()},
        {"source": Few(source=Annotated(), ids=(3, 4, 5))},
    ],
    "regions": [{"examples": Regions(patch=2, levels=1)}],
    "instances": [
        {"source": Scenes(images=20, held_out_images=9, side=24)},
        {"source": Framed(), "image_size": (8, 6)},
    ],
}


def inputs_of(name):
    for row in ROWS[name] if name in ROWS else [{}]:
        fields = {"source": Annotated(), "image_size": (4, 4), "workers": 0}
        try:
            yield Input(**({"examples": EXAMPLES[name]()} | fields | row))
        except ValueError as error:
            pytest.fail(f"give {name!r} a row in ROWS of {__file__}: {error}")


def read(data, **options):
    options = {"seed": 0, "batch_size": 5, "stop": 8} | options
    with train_batches(data, **options) as batches:
        return join(batches)


def read_eval(data, **options):
    options = {"batch_size": 8, "source": data.source} | options
    with eval_batches(data, **options) as batches:
        return join(batches)


def assert_declared(batch, fields, rows):
    assert batch.keys() == fields.keys()
    for name, field in fields.items():
        assert batch[name].shape == (rows, *field.shape), name
        assert batch[name].dtype == field.dtype, name


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_those_declared(name):
    for data in inputs_of(name):
        row = {name: EVAL_ROW[name] for name in ("index", "replaced")}
        assert_declared(read(data), data.examples.fields(data) | row, 40)
        whole = read_eval(data)
        rows = -(-len(data.source) // 8) * 8
        assert_declared(whole, data.examples.eval_fields(data) | EVAL_ROW, rows)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_a_function_of_seed_and_position(name):
    for data in inputs_of(name):
        want = read(data)
        assert_same(read(data), want)
        assert_same(read(dataclasses.replace(data, threads=1)), want)
        later = read(data, start=4)
        for key in want:
            np.testing.assert_array_equal(later[key], want[key][20:])
        assert (read(data, seed=1)["index"] != want["index"]).any()


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("crops", "instances")
        # Each starts a process.
        else pytest.param(name, marks=pytest.mark.slow)
        for name in EXAMPLES
    ],
)
def test_examples_travel_to_a_worker(name):
    for data in inputs_of(name):
        copy = pickle.loads(pickle.dumps(data))
        assert copy == data
        assert_same(read(copy), read(data))
        assert_same(read_eval(copy), read_eval(data))
    # A class of this file cannot be imported there.
    given = {"instances": Scenes(images=20, side=24)}
    source = given[name] if name in given else Digits()
    data = dataclasses.replace(data, source=source, workers=1)
    want = dataclasses.replace(data, workers=0)
    assert_same(read(data), read(want))


@pytest.mark.parametrize("name", EXAMPLES)
def test_rows_without_a_record_have_the_fill_values(name):
    for data in inputs_of(name):
        whole = read_eval(data)
        count = len(data.source)
        fields = data.examples.eval_fields(data) | EVAL_ROW
        assert not whole["valid"][count:].any() and len(whole["valid"]) > count
        for key, field in fields.items():
            assert (whole[key][count:] == field.fill).all(), key
        assert (whole["label"][count:] == -1).all()
        bad = np.flatnonzero(whole["replaced"])
        for key in fields.keys() - {*EVAL_ROW, "label"}:
            assert (whole[key][bad] == fields[key].fill).all(), key
        assert not whole["valid"][bad].any() and (whole["index"][bad] == bad).all()


@pytest.mark.parametrize("name", EXAMPLES)
def test_broken_records_are_replaced_whole(name):
    for data in inputs_of(name):
        if not isinstance(data.source, Annotated):
            continue
        got = read(data)
        np.testing.assert_array_equal(got["replaced"], np.isin(got["index"], (3, 11)))
        # All fields are of the record that is shown.
        shown = got["image"].reshape(40, -1)[:, 0]  # where the picture begins
        assert not np.isin(shown, (3, 11)).any()
        np.testing.assert_array_equal(got["label"], shown % 3)


def test_fields_of_a_source_come_through_unchanged():
    data = Input(source=Annotated(), image_size=(4, 4), workers=0)
    assert data.shapes["latents"] == ((2, 3), np.float32)
    data.check_offers(("image", "latents", "second_label"), "Reader")
    got, whole = read(data), read_eval(data)
    sound = ~got["replaced"]
    index = got["index"][sound]
    assert (got["latents"][sound] == index[:, None, None]).all()
    assert (got["second_label"][sound] == index % 5).all()
    valid = whole["valid"]
    assert (whole["latents"][valid] == whole["index"][valid][:, None, None]).all()
    # A substitute brings its own.
    shown = got["image"].reshape(40, -1).max(axis=1)
    assert (got["latents"] == shown[:, None, None]).all()


def test_a_few_images_have_the_fields_of_their_source():
    few = Few(source=Annotated(), ids=(7, 2))
    data = Input(source=few, image_size=(4, 4), workers=0)
    got = read_eval(data)
    assert got["latents"][:2, 0, 0].tolist() == [7, 2]
    assert few.fields() == Annotated().fields()
    assert few.held_out().fields() == Annotated().fields()


def test_a_source_may_not_declare_what_examples_have():
    class Clash(Annotated):
        def fields(self):
            return {"image2": FieldSpec((2,), np.float32)}

    Input(source=Clash())
    with pytest.raises(ValueError, match=r"Clash declares the fields \['image2'\]"):
        Input(source=Clash(), crops=2)


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (None, r"; missing: \['latents'\]"),
        (np.zeros((2, 4), np.float32), r"'latents' as float32\[2, 4\]; want float32"),
        # NumPy would broadcast the first and round the second without an error.
        (np.zeros((1, 3), np.float32), r"'latents' as float32\[1, 3\]; want float32"),
        (np.zeros((2, 3), np.float64), r"as float64\[2, 3\]; want float32\[2, 3\]"),
        ([[0.0] * 3] * 2, r"'latents' as list; want float32\[2, 3\]"),
    ],
)
@pytest.mark.parametrize("evaluate", [False, True])
def test_an_example_that_is_not_as_declared(latents, message, evaluate):
    class Wrong(Annotated):
        def __getitem__(self, index):
            record = super().__getitem__(index)
            if index == 7:  # any record may be the wrong one
                record["latents"] = latents
                if latents is None:
                    del record["latents"]
            return record

    data = Input(source=Wrong(), image_size=(4, 4), workers=0)
    method = "evaluate" if evaluate else "train"
    author = f"Crops.{method} for a record of Wrong returned"
    with pytest.raises(ValueError, match=f"{author}.*{message}"):
        read_eval(data) if evaluate else read(data)


def test_an_example_may_have_no_more_than_declared():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class More(Examples):
        def fields(self, data):
            return common_fields(data)

        def eval_fields(self, data):
            return common_fields(data)

        def train(self, record, data, rng):
            return self.evaluate(record, data) | {"boxes": np.zeros(4)}

        def evaluate(self, record, data):
            image = np.zeros(data.image_shape, np.uint8)
            return {"image": image, "label": np.int32(0)}

    data = Input(source=Numbered(), examples=More(), image_size=(4, 4), workers=0)
    read_eval(data)
    with pytest.raises(ValueError, match=r"More.train .*not declared: \['boxes'\]"):
        read(data)


# Boxes that follow crop and flip.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn(Numbered):
    """Grey rectangles on black, one to three of them, and where they are.

    Attributes:
        enlarged: if above 1, a JPEG of so many times the rows and columns.
    """

    count: int = 40
    bad: tuple[int, ...] = (5,)
    enlarged: int = 1

    def __getitem__(self, index):
        record = super().__getitem__(index)
        if index in self.bad:
            return record | {"boxes": np.zeros((0, 4), np.float32)}
        rng = np.random.default_rng(index)
        image = np.zeros((96, 120, 1), np.uint8)
        boxes = []
        for third in range(1 + index % 3):  # side by side, so that each can be told
            top, left = int(rng.integers(5, 40)), 40 * third + int(rng.integers(2, 8))
            bottom, right = top + int(rng.integers(20, 50)), left + 28
            image[top:bottom, left:right] = 60 * (third + 1) + 20
            boxes.append([top / 96, left / 120, bottom / 96, right / 120])
        if self.enlarged > 1:
            image = image.repeat(self.enlarged, axis=0).repeat(self.enlarged, axis=1)
            file = io.BytesIO()
            Image.fromarray(image[..., 0]).save(file, "JPEG", quality=95)
            image = file.getvalue()
        return record | {"image": image, "boxes": np.array(boxes, np.float32)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Boxes(Examples):
    """A crop with its boxes, padded to `most`, and which of these are real."""

    most: int = 4
    least_share: float = 0.02  # of a side of the view; smaller boxes are dropped

    def fields(self, data):
        return common_fields(data) | {
            "boxes": FieldSpec((self.most, 4), np.float32, fill=-1.0),
            "boxes_valid": FieldSpec((self.most,), np.bool_),
        }

    eval_fields = fields

    def train(self, record, data, rng):
        pixels = decode(record["image"], data.source.channels, data.suffices)
        view = data.sample_view(pixels.shape[:2], rng)
        return self._example(record, pixels, view)

    def evaluate(self, record, data):
        pixels = decode(record["image"], data.source.channels)
        return self._example(record, pixels, data.centre_view(pixels.shape[:2]))

    def _example(self, record, pixels, view):
        found = view.boxes(record["boxes"])
        sides = found[:, 2:] - found[:, :2]
        found = found[(sides > self.least_share).all(axis=1)][: self.most]
        boxes = np.full((self.most, 4), -1, np.float32)
        boxes[: len(found)] = found
        return {
            "image": view.image(pixels),
            "label": np.int32(record["label"]),
            "boxes": boxes,
            "boxes_valid": np.arange(self.most) < len(found),
        }


@pytest.mark.parametrize("enlarged", [1, 8])
def test_boxes_follow_crop_and_flip(enlarged):
    data = Input(
        source=Drawn(enlarged=enlarged),
        examples=Boxes(),
        image_size=(48, 64),
        crop_scale=(0.3, 1.0),
        workers=0,
    )
    data.check_offers(("image", "boxes", "boxes_valid"), "Detector")
    if enlarged > 1:  # training decodes a quarter of the rows and columns
        assert decode(data.source[0]["image"], 1, data.suffices).shape == (192, 240, 1)
    batches = {
        "train": read(data, batch_size=20, stop=6),
        "eval": read_eval(data, batch_size=25),
    }
    for kind, batch in batches.items():
        count = mirrored = 0
        rows = zip(batch["image"], batch["boxes"], batch["boxes_valid"], strict=True)
        for image, boxes, real in rows:
            assert (boxes[~real] == -1).all()
            levels = []
            for box in boxes[real] * [48, 64, 48, 64]:
                top, left, bottom, right = box
                middle = image[int((top + bottom) / 2), int((left + right) / 2), 0]
                # The pixels of this rectangle, by its grey level: 80, 140 or 200.
                level = 80 + 60 * round((int(middle) - 80) / 60)
                assert abs(int(middle) - level) < 20, "the box is not on its rectangle"
                levels.append((left, level))
                row = image[int((top + bottom) / 2), :, 0] > level / 2
                col = image[:, int((left + right) / 2), 0] > level / 2
                down, across = np.flatnonzero(col), np.flatnonzero(row)
                near = across[(across > left - 2) & (across < right + 1)]
                np.testing.assert_allclose(
                    [top, bottom, left, right],
                    [down[0], down[-1] + 1, near[0], near[-1] + 1],
                    atol=0.6,
                )
                count += 1
            order = [level for _, level in sorted(levels)]
            mirrored += order != sorted(order)
        assert count > 50, kind
        assert (mirrored > 10) == (kind == "train")  # both ways round are seen
    batch = batches["eval"]
    filled = ~batch["valid"]
    assert batch["index"][filled].tolist() == [5] + [-1] * 10
    assert (batch["boxes"][filled] == -1).all()
    assert not batch["boxes_valid"][filled].any()
