# SPDX-License-Identifier: Apache-2.0
"""Wrong values of config leaves and damaged image files, a few of each: fuzz.py throws
thousands."""

import functools

import fuzz
import leaves
import pytest

MAKERS = [
    functools.partial(leaves.experiment, "train", source="digits", objective="cmae"),
    functools.partial(leaves.experiment, "eval", eval="knn"),
    functools.partial(leaves.experiment, "study"),
]


def test_wrong_values_are_refused_in_a_line_or_in_range():
    ends, found = fuzz.fuzz_leaves(40, 0, MAKERS, planned=0)
    assert found == []
    assert ends["refused"] > 20 and ends["accepted"] > 3


def test_damaged_files_are_read_or_counted_and_named(tmp_path):
    ends, found = fuzz.fuzz_images(60, 0, tmp_path)
    assert found == []
    assert min(ends["read"], ends["refused"]) > 12


# The fuzzer itself.


def test_a_number_that_no_check_sees_is_found(monkeypatch):
    monkeypatch.setattr("mim_jax.trees.check_range", lambda *_: None)
    monkeypatch.setattr("mim_jax.schema.check_range", lambda *_: None)
    _, found = fuzz.fuzz_leaves(25, 0, MAKERS[1:2], planned=0)
    assert any(line.endswith("was accepted") for line in found)


def test_a_parser_that_lets_errors_through_is_found(monkeypatch):
    def fails(*_):
        raise KeyError("a parser's own")

    monkeypatch.setattr(fuzz, "decode", fails)
    with pytest.raises(fuzz.Finding, match="x: KeyError at .*: .a parser's own.$"):
        fuzz.one_image("x", b"")


def test_a_record_that_is_not_counted_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr(fuzz, "one_image", lambda name, data: "refused")
    _, found = fuzz.fuzz_images(6, 0, tmp_path)
    assert any(": not replaced" in line for line in found)
