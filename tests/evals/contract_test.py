# SPDX-License-Identifier: Apache-2.0
"""What every evaluation promises, whatever it measures.

The rows of `small_evals.SMALL` say how small an evaluation is tested; one that has no
row is tested with its defaults. Runs are tiny and untrained, one of each objective.
"""

import dataclasses
import functools
import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from small_evals import ALL, SMALL, objective_of, passes_of, run_of, small
from small_run import CLASSES
from tiny import TINY

from mim_jax.evals import EVALS
from mim_jax.evals.base import drawn
from mim_jax.evals.knn import KNN
from mim_jax.evals.report import Number, Report, save

# Images per batch. Neither divides 24 or 40, so there is padding.
SIZE, OTHER_SIZE = 7, 50
each = pytest.mark.parametrize("name", ALL)


@functools.cache
def accepted(name: str) -> list[str]:
    """The objectives whose runs an evaluation measures."""
    found = []
    for objective in TINY:
        try:
            small(name).check_objective(objective_of(objective))
        except ValueError as error:
            assert str(error), objective
        else:
            found.append(objective)
    return found


@functools.cache
def measured(name: str, objective: str, size: int = SIZE, labels: bool = True):
    evaluation, data = small(name), passes_of(size, labels)
    evaluation.check_data(objective_of(objective), data)
    return evaluation.measure(run_of(objective), data)


def check_number(key: str, number: Number) -> None:
    assert isinstance(number.value, int | float), key
    assert not math.isinf(number.value), key
    assert isinstance(number.unit, str) and number.unit, key
    assert number.n is None or (isinstance(number.n, int) and number.n >= 0), key
    if number.interval is not None:
        low, high = number.interval
        assert number.n and low <= number.value <= high, key


def test_no_row_is_stale():
    assert SMALL.keys() <= EVALS.keys()


@each
def test_a_run_of_every_objective_is_measured_or_refused_by_a_value_error(name):
    assert accepted(name)
    for objective in accepted(name):
        report = measured(name, objective)
        assert report.numbers
        for key, number in report.numbers.items():
            check_number(f"{objective}: {key}", number)


@each
def test_padding_and_batch_size_change_nothing(name):
    objective = accepted(name)[0]
    one, other = (measured(name, objective, size) for size in (SIZE, OTHER_SIZE))
    assert one.numbers.keys() == other.numbers.keys()
    for key, number in one.numbers.items():
        again = other.numbers[key]
        assert (again.unit, again.n) == (number.unit, number.n), key
        assert again.value == pytest.approx(number.value, rel=1e-5, nan_ok=True), key
    assert one.arrays.keys() == other.arrays.keys()
    for key, array in one.arrays.items():
        again = other.arrays[key]
        assert (again.shape, again.dtype) == (array.shape, array.dtype), key


@each
def test_what_is_written_can_be_read(name, tmp_path, capsys):
    report = measured(name, accepted(name)[0])
    found = {"x, step 3": report}
    save(tmp_path, name, found, small(name).draw(found))
    shown = capsys.readouterr().out
    assert all(key in shown for key in report.numbers)
    check_arrays(tmp_path, name, {key: key for key in report.arrays}, report)
    both = found | {"y, step 3": report}
    save(tmp_path, name, both, {})
    for run in both:
        keys = {key: f"{run}/{key}" for key in report.arrays}
        check_arrays(tmp_path, name, keys, report)


def check_arrays(folder, name: str, keys: dict[str, str], report: Report) -> None:
    if not report.arrays:
        return
    with np.load(folder / f"{name}.npz", allow_pickle=False) as arrays:
        for key, saved in keys.items():
            np.testing.assert_array_equal(arrays[saved], report.arrays[key])


@each
def test_one_run_and_two_are_drawn(name):
    first, last = accepted(name)[0], accepted(name)[-1]
    for found in (
        {"x, step 3": measured(name, first)},
        {"x, step 3": measured(name, first), "y, step 3": measured(name, last)},
    ):
        figures = small(name).draw(found)
        assert figures
        for title, figure in figures.items():
            assert isinstance(figure, Figure) and title.isidentifier()


@each
def test_names_with_dollars_are_no_formulas(name):
    """Runs and classes are called as anybody likes; "$x^$" is no formula that can be
    drawn."""
    report = measured(name, accepted(name)[0])
    arrays = {
        key: np.where(np.isin(one, CLASSES), np.char.add(one, "$x^$"), one)
        for key, one in report.arrays.items()
        if one.dtype.kind == "U"
    }
    odd = dataclasses.replace(report, arrays=report.arrays | arrays)
    for figure in drawn(small(name), {"$x^$, step 3": odd}).values():
        figure.draw_without_rendering()
    pair = drawn(small(name), {"$x^$, step 3": odd, "a_$, step 3": report})
    for figure in pair.values():
        figure.draw_without_rendering()


def test_figures_get_every_text_so_that_it_is_shown_as_it_is(monkeypatch):
    seen = {}
    monkeypatch.setattr(KNN, "draw", lambda self, found: seen.update(found) or {})
    arrays = {
        "none": np.array([], "U3"),
        "names": np.array([["$a$", "b"]]),
        "one": np.array("$"),
        "numbers": np.arange(3),
    }
    drawn(KNN(), {"a$, step 3": Report(numbers={}, arrays=arrays)})
    (run,) = seen
    assert run == r"a\$, step 3"
    shown = {key: one.tolist() for key, one in seen[run].arrays.items()}
    names = [[r"\$a\$", "b"]]
    assert shown == {"none": [], "names": names, "one": r"\$", "numbers": [0, 1, 2]}


@each
def test_the_compare_page_can_show_it(name):
    evaluation, report = small(name), measured(name, accepted(name)[0])
    assert evaluation.description.endswith(".") and evaluation.headlines
    for headline in evaluation.headlines:
        assert headline.better in ("higher", "lower", "neither")
        assert headline.title and headline.meaning.endswith(".")
        columns = headline.columns(report.numbers)
        assert columns, f"no number is {headline.key!r}"
        for key in columns:
            assert report.numbers[key].unit == headline.unit, key


@each
def test_images_without_labels_are_measured_or_refused_by_a_value_error(name):
    try:
        report = measured(name, accepted(name)[0], labels=False)
    except ValueError as error:
        assert "label" in str(error)
    else:
        for key, number in report.numbers.items():
            check_number(key, number)
