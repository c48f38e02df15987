# SPDX-License-Identifier: Apache-2.0
"""config.data refuses what cannot work, and says which fields a step may read."""

import dataclasses
import json

import numpy as np
import pytest
from records import Numbered, join

from mim_jax import config
from mim_jax.data.examples.base import Examples, common_fields
from mim_jax.data.fields import FieldSpec
from mim_jax.data.input import Input
from mim_jax.data.passes import EvalPasses
from mim_jax.data.pipeline import train_batches
from mim_jax.data.sources.digits import Digits


def make(source=None, **fields):
    fields = {"image_size": (4, 4), "workers": 0, "threads": 2} | fields
    return Input(source=source or Numbered(), **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": (0, 4)}, r"image_size=\(0, 4\)"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale.*0 < each"),
        ({"crop_scale": (0.5, 1.1)}, "crop_scale.*each <= 1"),
        ({"crop_ratio": (2.0, 1.0)}, "crop_ratio.*least <= greatest"),
        ({"local_crops": -1}, "local_crops=-1: want 0 <= local_crops"),
        ({"local_size": (4, 0)}, r"local_size=\(4, 0\): want 1 <= each"),
        ({"local_scale": (0.0, 0.3)}, r"local_scale=\(0\.0, 0\.3\): want 0 < each"),
        ({"local_scale": (0.3, 1.1)}, "local_scale.*each <= 1"),
        ({"eval_crop_fraction": 1.5}, "eval_crop_fraction=1.5"),
        ({"workers": -1}, "workers=-1: want 0 <= workers"),
        ({"threads": 0}, "threads=0: want 1 <= threads"),
        ({"prefetch": 0}, "prefetch=0: want 1 <= prefetch"),
        ({"max_replaced": -0.1}, "max_replaced=-0.1"),
    ],
)
def test_input_checks_its_ranges(fields, message):
    with pytest.raises(ValueError, match=message):
        Input(source=Numbered(), **fields)


def test_a_large_jpeg_is_decoded_to_no_less_than_every_crop_needs():
    # Sides of the least box: sqrt(area x scale x 3/4).
    for size in ((100, 60), (60, 100)):
        data = make(image_size=size, crop_scale=(0.25, 1.0))
        assert data.suffices((231, 231)) and not data.suffices((230, 231))
    data = make(
        image_size=(100, 100),
        crop_scale=(0.25, 1.0),
        local_crops=2,
        local_size=(60, 60),
        local_scale=(0.04, 0.25),
    )
    assert data.suffices((347, 347)) and not data.suffices((346, 346))


def test_shapes_are_those_of_the_batches():
    data = make(Digits(), crops=2, local_crops=2, local_size=(4, 3))
    with train_batches(data, seed=0, batch_size=2, stop=1) as batches:
        got = join(batches)
    assert data.shapes.keys() == {"image", "image2", "local", "label"}
    for name, (shape, kind) in data.shapes.items():
        assert got[name].shape == (2, *shape) and got[name].dtype == kind
    assert make().shapes.keys() == {"image", "label"}


@pytest.mark.parametrize(
    ("name", "fields", "setting"),
    [
        ("image2", dict(crops=2), "config.data.crops=2"),
        ("local", dict(local_crops=1), "config.data.local_crops >= 1"),
        ("boxes", {}, "a source that declares it, or config.data.examples that make"),
    ],
)
def test_a_field_that_is_not_offered(name, fields, setting):
    data = make()
    data.check_offers(("image", "label"), "Reader")
    with pytest.raises(ValueError) as error:
        data.check_offers(("image", name), "Reader")
    text = str(error.value)
    assert text.startswith(f"data has no {name!r}, which Reader reads; want {setting}")
    assert text.endswith("Source Numbered and examples Crops offer: image, label")
    if fields:  # the setting that the message names works
        make(**fields).check_offers(("image", name), "Reader")


@dataclasses.dataclass(frozen=True)
class Declared(Examples):
    """Examples with some further fields, for training or for evaluation."""

    further: dict
    further_eval: dict = dataclasses.field(default_factory=dict)

    def fields(self, data):
        return common_fields(data) | self.further

    def eval_fields(self, data):
        return common_fields(data) | self.further_eval

    def train(self, record, data, rng):
        raise NotImplementedError

    def evaluate(self, record, data):
        raise NotImplementedError


NUMBER = FieldSpec((), np.float32)


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ({"index": NUMBER}, r"Declared.fields declares \['index'\], names that every"),
        ({"valid": NUMBER}, r"Declared.fields declares \['valid'\], names that every"),
        (
            {"label": NUMBER},
            r"Declared.fields declares float32 \(fill 0\) as 'label'; want int32 "
            r"\(fill -1\), which the trainer",
        ),
        (
            {"image": FieldSpec((9, 4, 1), np.uint8)},
            r"declares uint8\[9, 4, 1\] \(fill 0\) as 'image'; want uint8\[4, 4, 1\]",
        ),
    ],
)
def test_declared_fields_keep_the_rules(further, message):
    make(examples=Declared({"latents": NUMBER}, {"latents": NUMBER}))
    with pytest.raises(ValueError, match=message):
        make(examples=Declared(further))
    message = message.replace("ed.fields", "ed.eval_fields")
    with pytest.raises(ValueError, match=message):
        make(examples=Declared({}, further))


def test_an_image_and_a_label_are_declared():
    class Nothing(Declared):
        def fields(self, data):
            return {}

    with pytest.raises(ValueError, match="declares nothing as 'image'; want uint8"):
        make(examples=Nothing({}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((0, 3), np.uint8), r"shape=\(0, 3\): want sizes of at least 1"),
        (((2,), np.str_), "dtype=<U0: want bool, an integer or a float"),
        (((2,), np.uint8, -1), "fill=-1: want a value of type uint8"),
        (((2,), np.int32, 0.5), "fill=0.5: want a value of type int32"),
    ],
)
def test_a_field_is_what_a_compiled_step_can_read(arguments, message):
    with pytest.raises(ValueError, match=message):
        FieldSpec(*arguments)


def test_a_field_fills_a_row():
    got = FieldSpec((2, 3), np.float32, fill=0.1).filled()
    assert (
        got.shape == (2, 3)
        and got.dtype == np.float32
        and (got == np.float32(0.1)).all()
    )
    assert np.isnan(FieldSpec((), np.float16, fill=float("nan")).filled())
    assert FieldSpec((3,), np.bool_, fill=True).filled().all()


def test_examples_are_chosen_by_name_and_old_configs_get_the_default(tmp_path):
    word, table = config.KINDS[Examples]
    tree = config.experiment("train", source="digits")
    assert tree.data.examples.name == next(iter(table)) and word == "examples"
    for name in table:
        chosen = config.experiment("train", source="digits", examples=name)
        assert chosen.data.examples.name == name
    saved = json.loads(config.dumps(tree))
    del saved["data"]["examples"]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(saved))
    assert config.load(path) == tree
    assert (
        config.build(config.load(path)).data.examples == Input(source=Digits()).examples
    )


@pytest.mark.parametrize(
    "workers, cores, want",
    [(None, 1, 0), (None, 2, 0), (None, 6, 4), (None, 96, 8), (8, 2, 2), (0, 4, 0)],
)
def test_no_more_processes_read_than_there_are_cores(monkeypatch, workers, cores, want):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)))
    assert make(workers=workers).processes == want


@pytest.mark.parametrize(
    "side, rows", [(8, 64), (224, 64), (384, 56), (512, 32), (1024, 8), (4096, 1)]
)
def test_evaluations_read_fewer_images_at_a_time_where_they_are_large(side, rows):
    data = Input(source=Digits(), image_size=(side, side), workers=0)
    assert EvalPasses(data).rows == rows
    assert EvalPasses(data, batch_size=5).rows == 5
    if side <= 512:
        with EvalPasses(data).held_out() as batches:
            assert next(iter(batches))["image"].shape == (rows, side, side, 1)
