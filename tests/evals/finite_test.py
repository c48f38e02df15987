# SPDX-License-Identifier: Apache-2.0
"""What is not finite or not readable never becomes an ordinary number."""

import ast
import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_evals import ALL, objective_of, passes_of, run_of, small

from mim_jax.evals.base import Eval, measured
from mim_jax.evals.features import extract
from mim_jax.evals.logits import predict
from mim_jax.evals.report import Number, Report, save
from mim_jax.objectives.base import LabelObjective
from mim_jax.schema import to_json

PACKAGE = pathlib.Path(__file__).parents[2] / "mim_jax"


def accepted(name: str) -> str:
    """An objective whose runs an evaluation measures."""
    for objective in ("mae", "supervised", "detection"):
        try:
            small(name).check_objective(objective_of(objective))
        except ValueError:
            continue
        return objective
    raise AssertionError(name)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ALL)
def test_parameters_that_are_not_finite_are_not_measured(name, value):
    run = run_of(accepted(name))
    params = jax.tree.map(lambda leaf: leaf, run.params)
    kernel = params["encoder"]["embed"]["kernel"]
    params["encoder"]["embed"]["kernel"] = kernel.at[0, 0].set(value)
    damaged = dataclasses.replace(run, params=params)
    with pytest.raises(ValueError) as caught:
        measured(small(name), damaged, passes_of(7))
    assert str(caught.value).startswith(
        f"{run.name}, step 3: the parameters encoder/embed/kernel are not finite"
    )


def test_features_and_logits_that_overflow_are_refused():
    def overflows(params, images):
        pixels = jnp.asarray(images, jnp.float32).reshape(len(images), -1)
        return jnp.float32(params) * pixels[:, :3]

    passes = passes_of(7)
    with pytest.raises(ValueError, match="features of 2[0-9] of 24 images are not fin"):
        extract(overflows, 3e38, passes.batches)
    with pytest.raises(ValueError, match="logits of . of 7 images are not finite"):
        list(predict(lambda images: overflows(3e38, images), passes.batches))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Odd(Eval):
    """Numbers that JSON does not have, and passes over both splits."""

    description = "Odd."
    headlines = ()

    def check_objective(self, objective):
        pass

    def measure(self, run, data):
        for split in (data.train, data.held_out, data.held_out):
            with split(spread=True) as batches:
                assert len(batches) == len(list(batches))
        numbers = {
            "nan": Number(math.nan, "dB", 3, (math.nan, math.inf)),
            "inf": Number(math.inf, "1"),
            "fine": Number(1.5, "1"),
        }
        return Report(numbers=numbers)

    def draw(self, found):
        return {}


def stop_at(constant: str):
    raise AssertionError(f"{constant} is no JSON")


def parsed(text: str):
    return json.loads(text, parse_constant=stop_at)


def test_reports_are_written_as_json(tmp_path, capsys):
    report = measured(Odd(), run_of("mae"), passes_of(7))
    save(tmp_path, "odd", {"x": report}, {})
    assert parsed((tmp_path / "odd.json").read_text()) == dict(
        nan=None, inf=None, fine=1.5
    )
    said = capsys.readouterr().out
    assert "nan" in said and "inf" in said  # people are told what it was
    described = parsed(to_json(report.described))
    assert described["nan"] == dict(value=None, unit="dB", n=3, interval=[None, None])


def test_records_that_cannot_be_read_are_counted_and_named():
    passes = passes_of(7)
    for batch, rows in ((passes.batches[1], [2, 5]), (passes.training[0], [0])):
        batch["valid"][rows] = False
    report = measured(Odd(), run_of("mae"), passes)
    assert report.numbers["unreadable_held_out"] == Number(2, "images")
    assert report.numbers["unreadable_train"] == Number(1, "images")
    assert report.arrays["unreadable_held_out"].tolist() == [
        "held_out/9",
        "held_out/12",
    ]
    assert report.arrays["unreadable_train"].tolist() == ["train/0"]
    # Padding is no such record.
    numbers = measured(Odd(), run_of("mae"), passes_of(7)).numbers
    assert numbers.keys() == {"nan", "inf", "fine"}


@pytest.mark.parametrize("name", ALL)
def test_images_of_one_grey_and_unreadable_ones_give_numbers_or_none(name):
    """Deviations are zero, differences are none: what has no value is NaN, no error."""
    passes = passes_of(7)
    for batch in (*passes.batches, *passes.training):
        batch["image"][:] = 128
    passes.batches[0]["valid"][:2] = False
    passes.batches[0]["image"][:2] = 0
    evaluation = small(name)
    try:
        report = measured(evaluation, run_of(accepted(name)), passes)
    except ValueError as error:
        assert "\n" not in str(error)
        return
    if name != "shape_bias":  # which reads a set
        assert report.numbers["unreadable_held_out"].value == 2
    parsed(to_json(report.described))
    assert evaluation.draw({"x": report}) is not None
    assert evaluation.sentence(report) is not None


def test_what_learns_labels_asks_for_them_before_training():
    unlabelled = passes_of(7, labels=False)
    for name in ("linear", "ridge", "tsne", "robustness"):
        evaluation = small(name)
        objective = objective_of(accepted(name))
        evaluation.check_data(objective, passes_of(7))
        with pytest.raises(ValueError, match="labels"):
            evaluation.check_data(objective, unlabelled)
    assert issubclass(type(objective_of("supervised")), LabelObjective)


def test_all_json_is_written_by_one_function():
    """NaN comes out of json.dumps as a token that no other reader knows."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            if ast.unparse(node.func) not in ("json.dump", "json.dumps"):
                continue
            strict = any(
                word.arg == "allow_nan" and ast.unparse(word.value) == "False"
                for word in node.keywords
            )
            # The digest of an old record is of its text, as it was written.
            assert strict or path.name == "digests.py", f"{path}:{node.lineno}"
