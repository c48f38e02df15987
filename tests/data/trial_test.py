# SPDX-License-Identifier: Apache-2.0
"""One record of each split is tried before anything compiles."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from records import Numbered
from tables import restored
from tiny import tree_of

from mim_jax import config
from mim_jax.data.decoding import Undecodable
from mim_jax.data.examples.base import Examples, common_fields
from mim_jax.data.fields import ExampleError, FieldSpec
from mim_jax.data.input import Input
from mim_jax.data.pipeline import eval_batches, train_batches
from mim_jax.data.sources.base import Source
from mim_jax.data.trial import check_first
from mim_jax.plan import Plan

frozen = dataclasses.dataclass(frozen=True, kw_only=True)
GREY = np.zeros((5, 6, 1), np.uint8)
SCORE = FieldSpec((2,), np.float32)


@frozen
class Good(Source):
    """Three records of each split, and a note of those that were read."""

    split: str = "train"

    def __len__(self) -> Any:
        return 3

    def __getitem__(self, index) -> Any:
        READ.append((self.split, index))
        return {"image": GREY, "label": 1, "score": np.ones(2, np.float32)}

    def fields(self) -> Any:
        return {"score": SCORE}

    @property
    def classes(self) -> Any:
        return ("a", "b")

    @property
    def channels(self) -> Any:
        return 1

    def held_out(self) -> Any:
        return dataclasses.replace(self, split="held_out")

    def fingerprint(self) -> Any:
        return {"name": "good", "split": self.split, "sides": [5, 6]}


READ: list[tuple[str, int]] = []


@frozen
class Plain(Examples):
    """The image cut to the size; `more` has what a test puts into the example."""

    def fields(self, data) -> Any:
        return common_fields(data)

    eval_fields = fields

    def train(self, record, data, rng) -> Any:
        return {"image": record["image"][:4, :4], "label": np.int32(0)}

    def evaluate(self, record, data) -> Any:
        return self.train(record, data, None)


def source(**methods) -> Source:
    return frozen(type("Mine", (Good,), methods))()


def examples(**methods) -> Examples:
    return frozen(type("Mine", (Plain,), methods))()


def without(key):
    return lambda self, index: {
        name: value
        for name, value in Good.__getitem__(Good(), index).items()
        if name != key
    }


def given(key, value):
    return lambda self, index: Good.__getitem__(Good(), index) | {key: value}


def nothing(self, *given):
    pass


def refused(**parts) -> str:
    with pytest.raises(ValueError) as caught:
        check_first(Input(**dict(source=Good(), image_size=(4, 4)) | parts))
    found = str(caught.value)
    assert "\n" not in found
    return found


RETURN = "None (has it a `return`?)"


@pytest.mark.parametrize(
    "methods, expected",
    [
        (dict(__getitem__=nothing), f"Mine[0] returned {RETURN}: want a dict with 'im"),
        (
            dict(__getitem__=without("image")),
            "Mine[0] returned a record without 'image': it has 'label', 'score'; want "
            "a dict with 'image' and 'label'",
        ),
        (dict(__getitem__=without("label")), "Mine[0] returned a record without 'labe"),
        (dict(__getitem__=without("score")), "Mine[0] returned a record without 'scor"),
        (
            dict(__getitem__=given("image", GREY / 255)),
            "Mine[0] returned 'image' as float64[5, 6, 1]: want a uint8 array of rows, "
            "columns and channels, or an encoded image as bytes",
        ),
        (
            dict(__getitem__=given("image", GREY[..., 0])),
            "Mine[0] returned 'image' as uint8[5, 6]: want a uint8 array",
        ),
        (
            dict(__getitem__=given("image", "a.png")),
            "Mine[0] returned 'image' as 'a.png': want a uint8 array",
        ),
        (
            dict(__getitem__=given("label", None)),
            "Mine[0] returned 'label' as None: want an int, the position in `classes`",
        ),
        (
            dict(__getitem__=given("label", "a")),
            "Mine[0] returned 'label' as 'a': want an int",
        ),
        (
            dict(__getitem__=given("score", np.ones(2))),
            "Mine[0] returned 'score' as float64[2]; want float32[2]",
        ),
        (
            dict(__getitem__=lambda self, index: {}["x"]),
            f"Mine[0] raised KeyError: 'x' ({__file__}:",
        ),
        (dict(held_out=nothing), f"Mine.held_out returned {RETURN}: want a Source"),
        (
            dict(held_out=lambda self: self),
            "Mine.held_out returned a source whose fingerprint is that of the training "
            "split, {'name': 'good', 'split': 'train', 'sides': [5, 6]}: want other ",
        ),
        (dict(fingerprint=nothing), f"Mine.fingerprint returned {RETURN}: want a dict"),
        (
            dict(fingerprint=lambda self: {"sides": (5, 6)}),
            "Mine.fingerprint returned {'sides': (5, 6)}: want a dict of plain JSON",
        ),
        (
            dict(fingerprint=lambda self: {"image": GREY[0, 0]}),
            "Mine.fingerprint returned {'image': array([0], dtype=uint8)}: want a dict",
        ),
        (
            dict(fingerprint=lambda self: {"mean": float("nan")}),
            "Mine.fingerprint returned {'mean': nan}: want a dict of plain JSON",
        ),
        (dict(__len__=nothing), f"Mine.__len__ returned {RETURN}: want an int of at "),
        (dict(__len__=lambda self: 0), "Mine.__len__ returned 0: want an int of at le"),
        (dict(classes=None), f"Mine.classes is {RETURN}: want a tuple of names, () if"),
        (dict(classes="ab"), "Mine.classes is 'ab': want a tuple of names"),
        (dict(channels=None), f"Mine.channels is {RETURN}: want an int of at least 1"),
        (
            dict(fields=nothing),
            f"Mine.fields returned {RETURN}: want a dict of FieldSp",
        ),
        (
            dict(fields=lambda self: {"score": ((2,), np.float32)}),
            "Mine.fields declares 'score' as ((2,), <class 'numpy.float32'>): want a "
            "dict of FieldSpecs by name, such as FieldSpec((4,), np.float32)",
        ),
    ],
)
def test_a_source_that_breaks_a_promise_is_named(methods, expected):
    for name in ("classes", "channels"):
        if name in methods:
            value = methods[name]
            methods = methods | {name: property(lambda self, value=value: value)}
    assert refused(source=source(**methods)).startswith(expected)


@pytest.mark.parametrize(
    "methods, expected",
    [
        (
            dict(train=nothing),
            f"Mine.train for a record of Good returned {RETURN}: want a dict with the "
            "fields ['image', 'label']",
        ),
        (
            dict(train=lambda self, record, data, rng: {"image": GREY[:4, :4]}),
            "Mine.train for a record of Good returned the fields ['image']; want those "
            "that it declares, ['image', 'label']; missing: ['label']",
        ),
        (
            dict(
                train=lambda self, record, data, rng: dict(
                    image=GREY[:4, :4], label=record["label"]
                )
            ),
            "Mine.train for a record of Good returned 'label' as int; want int32, such "
            "as np.int32(...)",
        ),
        (
            dict(train=lambda self, record, data, rng: record["boxes"]),
            f"Mine.train for a record of Good raised KeyError: 'boxes' ({__file__}:",
        ),
        (
            dict(evaluate=nothing),
            f"Mine.evaluate for a record of Good returned {RETURN}: want a dict",
        ),
        (dict(fields=nothing), f"Mine.fields returned {RETURN}: want a dict of FieldS"),
        (
            dict(eval_fields=lambda self, data: {"image": (4, 4, 1)}),
            "Mine.eval_fields declares 'image' as (4, 4, 1): want a dict of FieldSpecs",
        ),
    ],
)
def test_examples_that_break_a_promise_are_named(methods, expected):
    assert refused(examples=examples(**methods)).startswith(expected)


def test_a_list_where_an_array_was_declared_gets_the_call_that_makes_one():
    mine = examples(
        fields=lambda self, data: common_fields(data) | {"score": SCORE},
        train=lambda self, record, data, rng: (
            Plain.train(self, record, data, rng) | {"score": [1.0, 2.0]}
        ),
    )
    expected = "as list; want float32[2], such as np.asarray(..., np.float32)"
    assert refused(examples=mine).endswith(expected)


@pytest.mark.parametrize("host, index", [(0, 0), (2, 2), (4, 1)])
def test_one_record_of_each_split_is_read(host, index):
    READ.clear()
    check_first(Input(source=Good(), image_size=(4, 4)), host)
    assert READ == [("train", index), ("held_out", index)]


@frozen
class Damaged(Numbered):
    """Its first record is no image."""

    bad: tuple[int, ...] = (0,)

    def fingerprint(self):
        return {"count": self.count}


def test_an_image_that_cannot_be_decoded_is_left_to_the_pipeline():
    check_first(Input(source=Damaged(), image_size=(4, 4)))
    with pytest.raises(Undecodable):
        data = Input(source=Damaged(), image_size=(4, 4))
        data.examples.evaluate(data.source[0], data)


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("fault", [Undecodable("no image"), OSError(5, "disk\nfault")])
def test_a_split_of_which_nothing_can_be_read_is_refused(split, fault):
    def broken(self, index):
        if self.split == split:
            raise fault
        return Good.__getitem__(self, index)

    what = {"train": "training", "held_out": "held-out"}[split]
    expected = f"Mine: none of 21 {what} records that were tried can be read, such as M"
    assert refused(source=source(__getitem__=broken)).startswith(expected)


def test_a_plan_refuses_what_the_trial_finds():
    with restored():
        config.register("mine", type(source(__getitem__=given("label", None))))
        tree = tree_of("mae")
        with tree.unlocked():
            tree.data.source = config.choose(Source, "mine")
        with pytest.raises(config.ConfigError, match=r"^config: Mine\[0\] returned 'l"):
            Plan.of(tree)
        Plan.of(tree, stand_in=True)


# What goes wrong later.


@frozen
class Late(Good):
    """Its last record has no label."""

    def __getitem__(self, index):
        label = None if index == len(self) - 1 else 0
        return super().__getitem__(index) | {"label": label}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_later_record_that_breaks_a_promise_is_named_too(workers):
    data = Input(source=Late(), image_size=(4, 4), workers=workers, threads=1)
    check_first(data)
    for batches, method in [
        (train_batches(data, seed=0, batch_size=3), "train"),
        (eval_batches(data, batch_size=3), "evaluate"),
    ]:
        with batches, pytest.raises(ExampleError) as caught:
            next(batches)
        found = str(caught.value)
        assert found.startswith(f"Crops.{method} for a record of Late raised TypeErr")
        assert "\n" not in found


def test_errors_of_the_disk_are_records_that_cannot_be_read():
    def fails(self, index):
        if index == 1:
            raise OSError(5, "Input/output error")
        return Good.__getitem__(self, index)

    data = Input(source=source(__getitem__=fails), image_size=(4, 4), workers=0)
    with train_batches(data, seed=0, batch_size=3) as batches:
        batch = next(batches)
        assert (batch["replaced"] == (batch["index"] == 1)).all()
