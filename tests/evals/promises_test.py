# SPDX-License-Identifier: Apache-2.0
"""Evaluations that break a promise are named, wherever they are run."""

import dataclasses
import json
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
import small_run
from matplotlib.figure import Figure

from mim_jax.config import ConfigError
from mim_jax.evals.base import Eval, Headline, drawn, measured
from mim_jax.evals.report import Number, Report, ReportError
from mim_jax.run import loading

LINE = Headline("rank", "rank", "1", "higher", "How many.")


class Any_(Eval):
    """Returns what a test gives it."""

    description = "Nothing."
    headlines = (LINE,)
    report: Any = None
    figures: Any = None

    def check_objective(self, objective):
        pass

    def measure(self, run, data) -> Any:
        return self.report() if callable(self.report) else self.report

    def draw(self, found) -> Any:
        return self.figures


def returning(**what) -> Eval:
    return dataclasses.dataclass(frozen=True)(type("Mine", (Any_,), what))()


@pytest.mark.parametrize(
    "name, value, expected",
    [
        (
            "headlines",
            LINE,
            r"Mine.headlines is Headline\(.*: want a tuple of Headline",
        ),
        (
            "headlines",
            [LINE],
            r"Mine.headlines is \[Headline\(.*: want a tuple of Head",
        ),
        (
            "headlines",
            ("rank",),
            r"Mine.headlines is \('rank',\): want a tuple of Head",
        ),
        (
            "headlines",
            (LINE._replace(better="more"),),
            "Mine.headlines: better='more' of 'rank': want one of higher, lower, neith",
        ),
        ("description", None, r"Mine.description is None: want a str"),
    ],
)
def test_a_class_that_says_too_little_of_itself_is_refused(name, value, expected):
    with pytest.raises(TypeError, match=expected):
        type("Mine", (Any_,), {name: value})


def built(numbers: Any, arrays: Any) -> Report:
    """A report without the type checks of the tests, which users do not have."""
    report = object.__new__(Report)
    object.__setattr__(report, "numbers", numbers)
    object.__setattr__(report, "arrays", arrays)
    report.__post_init__()
    return report


@pytest.mark.parametrize(
    "parts, expected",
    [
        (
            dict(numbers={"rank": 3.0}),
            "numbers['rank'] is 3.0: want Number(VALUE, UNIT",
        ),
        (
            dict(numbers={"rank": (3.0, "1")}),
            "numbers['rank'] is (3.0, '1'): want Numb",
        ),
        (
            dict(numbers={"rank": Number(np.ones(2), "1")}),  # pyright: ignore
            "numbers['rank'] is Number(value=array([1., 1.]), unit='1'",
        ),
        (dict(numbers=[Number(1, "1")]), "numbers=[Number(value=1, unit='1'"),
        (
            dict(numbers={}, arrays={"rows": [[1], [1, 2]]}),
            "arrays['rows'] is [[1], [1, 2]]: want an array of numbers, booleans or st",
        ),
        (dict(numbers={}, arrays={"rows": None}), "arrays['rows'] is None"),
        (dict(numbers={}, arrays=None), "arrays=None"),
    ],
)
def test_a_report_holds_numbers_and_arrays(parts, expected):
    with pytest.raises(ReportError) as caught:
        built(**(dict(arrays={}) | parts))
    assert str(caught.value).startswith(expected)


def test_lists_and_scalars_of_numpy_and_jax_become_what_files_can_hold():
    numbers = {
        "numpy": Number(np.float32(0.5), "1"),  # pyright: ignore
        "jax": Number(jnp.ones(()), "1"),  # pyright: ignore
        "count": Number(np.int64(3), "images"),  # pyright: ignore
    }
    report = built(numbers, {"rows": [[1, 2], [3, 4]]})
    assert json.dumps(report.scalars) == '{"numpy": 0.5, "jax": 1.0, "count": 3}'
    np.testing.assert_array_equal(report.arrays["rows"], np.array([[1, 2], [3, 4]]))


FOUND = Report(numbers={"rank": Number(1, "1")})


@pytest.mark.parametrize(
    "report, expected",
    [
        (None, "Mine.measure returned None (has it a `return`?): want Report(numbers="),
        ({"rank": 3.0}, "Mine.measure returned {'rank': 3.0}: want Report(numbers="),
        (
            staticmethod(lambda: built({"rank": 3.0}, {})),
            "Mine.measure: Report: numbers['rank'] is 3.0: want Number(",
        ),
    ],
)
def test_measure_returns_a_report(report, expected):
    mine, run = returning(report=report), small_run.run()
    with pytest.raises(ConfigError) as caught:
        measured(mine, run, small_run.passes())
    assert str(caught.value).startswith(expected)
    # It is no reason to leave a run out, as data that cannot be measured are.
    one = mock.Mock(spec=loading.Loaded, run=run, passes=small_run.passes())
    with pytest.raises(ConfigError):
        loading.measure(mine, {"x": one})


def test_data_that_cannot_be_measured_are_a_reason():
    def refuse():
        raise ValueError("no labels")

    run = small_run.run()
    one = mock.Mock(spec=loading.Loaded, run=run, passes=small_run.passes())
    mine = returning(report=staticmethod(refuse))
    assert loading.measure(mine, {"x": one}) == ({}, {"x": "no labels"})
    assert loading.measure(returning(report=FOUND), {"x": one}) == ({"x": FOUND}, {})


@pytest.mark.parametrize(
    "figures, expected",
    [
        (None, "None (has it a `return`?)"),
        (Figure(), "<Figure size"),
        ({"rank": None}, "{'rank': None}"),
        ({1: Figure()}, "{1: <Figure"),
    ],
)
def test_draw_returns_figures_by_name(figures, expected):
    with pytest.raises(ConfigError) as caught:
        drawn(returning(figures=figures), {"x": FOUND})
    assert str(caught.value).startswith(f"Mine.draw returned {expected}")
    assert drawn(returning(figures={}), {"x": FOUND}) == {}
