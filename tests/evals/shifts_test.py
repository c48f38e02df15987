# SPDX-License-Identifier: Apache-2.0
"""Robustness and shape bias of a classifier whose images say its answers."""

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest
from passes import Given, GivenSet

from mim_jax.evals.base import Run
from mim_jax.evals.logits import membership
from mim_jax.evals.robustness import Robustness, right
from mim_jax.evals.shape_bias import ShapeBias, decisions
from mim_jax.objectives.base import LabelObjective
from mim_jax.objectives.mae import MAE


@dataclasses.dataclass(frozen=True)
class Told(LabelObjective):
    """Logits are the pixels of an image of one row and one column per class."""

    classes: int

    def logits(self, params, stats, images):
        return images[:, 0, :, 0].astype(jnp.float32)

    def _never(self, *args):
        raise NotImplementedError

    check_shape = init = loss = teacher = flops = _never


def told(classes):
    return Run(objective=Told(classes), params={}, initial={}, step=1, name="told")


def batches(logits, labels, size):
    """Padded batches of images that are those logits.

    Args:
        labels: a tuple for each image, or a number: the run's own split.
    """
    logits, found = np.asarray(logits, np.uint8), []
    many = isinstance(labels[0], tuple)
    most = max(map(len, labels)) if many else 0
    for start in range(0, len(logits), size):
        count = min(size, len(logits) - start)
        image = np.zeros((size, 1, logits.shape[1], 1), np.uint8)
        image[:count, 0, :, 0] = logits[start : start + count]
        # What fills must not count, whatever it is.
        image[count:] = 77
        index = np.full(size, -1, np.int32)
        index[:count] = np.arange(start, start + count)
        batch = {"image": image, "index": index, "valid": index >= 0}
        if many:
            table = np.full((size, most), -1, np.int32)
            for row, some in enumerate(labels[start : start + count]):
                table[row, : len(some)] = some
            batch["labels"] = table
        else:
            batch["label"] = np.full(size, -1, np.int32)
            batch["label"][:count] = labels[start : start + count]
        found.append(batch)
    return found


def a_set(logits, labels, members, size=3, classes=None, pairs=False):
    logits = np.asarray(logits, np.uint8)
    images = types.SimpleNamespace(
        classes=classes or tuple(map(str, range(len(members)))),
        members=members,
        model_classes=logits.shape[1],
        pairs=pairs,
    )
    images = type("Images", (), {**vars(images), "__len__": lambda self: len(logits)})()
    return GivenSet(images, batches(logits, labels, size))


# Robustness.

OWN = ([[9, 1, 2, 3], [1, 9, 2, 3], [9, 1, 2, 3], [1, 2, 3, 9]], [0, 1, 2, -1])
FOUR = tuple((k,) for k in range(4))


def measure(sets=None, own=OWN, size=3, **fields):
    sets = sets or {}
    count = len(own[0][0])
    names = tuple(f"class {k}" for k in range(count))
    data = Given(batches(*own, size), [], names, sets)
    evaluation = Robustness(sets=tuple(sets), **fields)
    return evaluation, evaluation.measure(told(count), data)


def value(report, name):
    return report.numbers[name].value, report.numbers[name].n


def test_held_out_accuracy_by_hand():
    evaluation, report = measure()
    # Two of three are right, and the fourth has no label.
    assert value(report, "accuracy_held_out") == (pytest.approx(2 / 3), 3)
    assert report.numbers["left_out_held_out"].value == 1
    low, high = report.numbers["accuracy_held_out"].interval
    assert 0 < low < 2 / 3 < high < 1
    assert not any("top5" in name for name in report.numbers)  # of four classes
    assert report.arrays["mistaken"].tolist() == ["class 2"]
    assert report.arrays["taken_for"].tolist() == ["class 0"]
    assert evaluation.draw({"x": report}).keys() == {"robustness", "mistakes"}
    both = evaluation.draw({"x": report, "y": report})
    assert both.keys() == {"robustness", "mistakes0", "mistakes1"}


def test_classes_that_a_set_does_not_have_do_not_compete():
    logits = [[9, 1, 2, 3], [9, 3, 2, 1]]
    # Class 3 in first place of the set, class 1 in second; of both images the first
    # choice of the model is class 0.
    some = a_set(logits, [(0,), (1,)], ((3,), (1,)))
    every = a_set(logits, [(3,), (1,)], FOUR)
    _, report = measure({"some": some, "every": every})
    assert value(report, "accuracy_some") == (1.0, 2)
    assert value(report, "accuracy_every") == (0.0, 2)


def test_a_class_of_the_set_may_be_several_of_the_model():
    members = ((0, 2), (1,))
    logits = [[1, 5, 9, 3], [9, 5, 1, 3], [1, 9, 5, 3], [1, 5, 9, 3]]
    found = a_set(logits, [(0,), (0,), (0,), (1,)], members)
    _, report = measure({"found": found})
    # Labels of the model 2, 0, 1 and 2; class 3 is of no class of the set.
    assert value(report, "accuracy_found") == (0.5, 4)


def test_an_image_may_have_several_right_labels_or_none():
    logits = [[9, 1, 2, 3], [1, 9, 2, 3], [1, 2, 9, 3], [1, 2, 3, 9], [9, 1, 2, 3]]
    found = a_set(logits, [(3, 0), (2, 3), (2,), (2,), ()], FOUR)
    _, report = measure({"real": found})
    # Right are the first and the third; the fourth has no second label, which could be
    # the last class.
    assert value(report, "accuracy_real") == (0.5, 4)
    assert report.numbers["left_out_real"].value == 1


def test_top_five_by_hand():
    logits = [[80, 70, 60, 50, 40, 30, 20]] * 3
    found = a_set(logits, [(4,), (5,), (0,)], tuple((k,) for k in range(7)))
    # Without class 0, the fifth is class 5.
    some = a_set(logits, [(4,), (5,)], tuple((k,) for k in range(1, 7)))
    own = (logits, [0, 4, 6])
    _, report = measure({"found": found, "some": some}, own)
    assert value(report, "top5_held_out") == (pytest.approx(2 / 3), 3)
    assert value(report, "accuracy_held_out") == (pytest.approx(1 / 3), 3)
    assert value(report, "top5_found") == (pytest.approx(2 / 3), 3)
    # Labels of that set: 4 is class 5, fifth; 5 is class 6, sixth.
    assert value(report, "top5_some") == (0.5, 2)


def test_of_equal_logits_the_first_is_taken():
    logits = np.array([[5.0, 5.0], [5.0, 5.0]])
    labels = np.array([[0], [1]])
    found = right(logits, labels, np.eye(2, dtype=bool))
    assert found.tolist() == [True, False]


@pytest.mark.parametrize("size", [1, 2, 5, 64])
def test_padding_and_batch_size_change_nothing(size):
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 255, (23, 7))
    labels = [(int(label),) for label in rng.integers(0, 6, 23)]
    members = ((0, 6), *((k,) for k in range(1, 6)))
    sets = {"x": a_set(logits, labels, members, size)}
    own = (logits, [some[0] for some in labels])
    _, report = measure(sets, own, size)
    _, again = measure({"x": a_set(logits, labels, members, 23)}, own, 23)
    assert report.numbers == again.numbers
    assert report.numbers["accuracy_x"].n == 23
    table = membership(members, 7)
    best = table[:, logits.argmax(axis=1)].argmax(axis=0)
    want = best == [label for (label,) in labels]
    assert report.numbers["accuracy_x"].value == pytest.approx(np.mean(want))


def test_records_that_cannot_be_read_are_told():
    found = a_set([[9, 1, 2, 3]] * 4, [(0,)] * 4, FOUR)
    found.given[0]["valid"][1] = False
    _, report = measure({"x": found})
    assert report.numbers["accuracy_x"].n == 3
    assert report.numbers["unreadable_x"].value == 1
    assert "unreadable_held_out" not in report.numbers


def test_sets_that_do_not_fit_are_left_out_on_request(capsys):
    three = a_set([[1, 2, 3]], [(0,)], ((0,), (1,), (2,)))
    four = a_set([[9, 1, 2, 3]], [(0,)], FOUR)
    evaluation, report = measure({"three": three, "four": four}, skip_absent=True)
    assert value(report, "accuracy_four") == (1.0, 1)
    assert value(report, "accuracy_held_out") == (pytest.approx(2 / 3), 3)
    assert "accuracy_three" not in report.numbers
    told_about = capsys.readouterr().err
    assert told_about.count("WARNING") == 1 and "models of 3 classes" in told_about
    data = Given([], [], ("a", "b", "c", "d"), {"three": three})
    evaluation.check_data(Told(4), data)  # before measuring, too


def test_what_robustness_refuses():
    with pytest.raises(ValueError, match="MAE tells no classes apart; want .*finetune"):
        Robustness().check_objective(MAE())
    Robustness().check_objective(Told(4))
    three = a_set([[1, 2, 3]], [(0,)], ((0,), (1,), (2,)))
    with pytest.raises(ValueError, match="models of 3 classes, and this one has 4"):
        measure({"three": three})
    with pytest.raises(ValueError, match="models of 3 classes"):
        Robustness(sets=("three",)).check_data(
            Told(4), Given([], [], ("a",), {"three": three})
        )
    pairs = a_set([[1, 2, 3, 4]], [(0, 1)], FOUR, pairs=True)
    with pytest.raises(ValueError, match="'pairs' has images of two classes each"):
        measure({"pairs": pairs})
    with pytest.raises(ValueError, match="'none' has no image with a class"):
        measure({"none": a_set([[1, 2, 3, 4]] * 2, [(), ()], FOUR)})
    with pytest.raises(ValueError, match="want each name once"):
        Robustness(sets=("imagenet_v2=a", "imagenet_v2=b"))
    with pytest.raises(ValueError, match="mistakes=-1"):
        Robustness(mistakes=-1)
    unlabelled = Given(batches(*OWN, 3))
    with pytest.raises(ValueError, match="no labels to compare to"):
        Robustness().measure(told(4), unlabelled)


# Shape bias.


def test_a_category_counts_by_its_mean():
    # Probabilities .2 .2 .1 .3 .2: the first three sum to .5 and their mean is .167;
    # the fourth alone has .3; the fifth is of no category.
    logits = np.log([[0.2, 0.2, 0.1, 0.3, 0.2], [0.3, 0.35, 0.3, 0.03, 0.02]])
    members = membership(((0, 1, 2), (3,)), 5)
    assert decisions(logits, members).tolist() == [1, 0]
    # The mean is of probabilities, not of logits: .5 and .001 beat .2 and .2.
    logits = np.log([[0.5, 0.001, 0.2, 0.2, 0.099]])
    assert decisions(logits, membership(((2, 3), (0, 1)), 5)).tolist() == [1]
    # And of probabilities as they are: large logits do not overflow.
    logits = np.array([[1000.0, 999.0, 0.0]])
    assert decisions(logits, membership(((1, 2), (0,)), 3)).tolist() == [1]


def conflicts(size=3):
    """Three categories of six classes: a = 0 1, b = 2, c = 3; 4 and 5 are in none."""
    of = {label: np.eye(6)[label] * 90 for label in range(6)}
    said = [
        *(((0, 1), of[0]), ((0, 2), of[1]), ((1, 0), of[2])),  # the shape
        *(((0, 1), of[2]), ((1, 0), of[0])),  # the texture
        ((0, 2), of[2]),  # neither
        ((2, 2), of[3]),  # shape and texture are one: left out
    ]
    labels, logits = zip(*said, strict=True)
    members = ((0, 1), (2,), (3,))
    return a_set(logits, labels, members, size, ("a", "b", "c"), pairs=True)


@pytest.mark.parametrize("size", [1, 3, 20])
def test_shape_bias_by_hand(size):
    data = Given([], [], (), {"cues": conflicts(size)})
    evaluation = ShapeBias(examples=4)
    report = evaluation.measure(told(6), data)
    assert value(report, "images") == (6, None)
    assert value(report, "shape_bias") == (pytest.approx(3 / 5), 5)
    assert value(report, "shape_share") == (pytest.approx(3 / 6), 6)
    assert value(report, "texture_share") == (pytest.approx(2 / 6), 6)
    assert value(report, "neither_share") == (pytest.approx(1 / 6), 6)
    assert value(report, "shape_bias_a") == (pytest.approx(2 / 3), 3)
    assert value(report, "shape_bias_b") == (pytest.approx(1 / 2), 2)
    assert "shape_bias_c" not in report.numbers
    # Wilson's score of 3 of 5, by its formula.
    z, p, n = 1.959964, 0.6, 5
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    assert report.numbers["shape_bias"].interval == pytest.approx(
        (middle - half, middle + half), abs=1e-5
    )
    assert report.arrays["head"] == "Told"
    # The pictures are those that their captions speak of.
    every = np.concatenate([batch["image"] for batch in conflicts(20).given])
    assert len(report.arrays["chosen"]) == 3  # the fourth has cues that agree
    for row, image in zip(
        report.arrays["chosen"], report.arrays["examples"], strict=True
    ):
        np.testing.assert_array_equal(image, every[row])
    assert evaluation.draw({"x": report}).keys() == {"shape_bias", "decisions"}
    both = evaluation.draw({"x": report, "y": report})
    assert both.keys() == {"shape_bias", "decisions0", "decisions1"}


def test_no_decision_for_either_is_no_bias():
    found = a_set([[0, 0, 9]], [(0, 1)], ((0,), (1,), (2,)), pairs=True)
    report = ShapeBias().measure(told(3), Given([], [], (), {"cues": found}))
    assert np.isnan(report.numbers["shape_bias"].value)
    assert value(report, "neither_share") == (1.0, 1)
    assert ShapeBias().draw({"x": report})


def test_what_shape_bias_refuses():
    with pytest.raises(ValueError, match="MAE tells no classes apart"):
        ShapeBias().check_objective(MAE())
    plain = a_set([[1, 2, 3]], [(0,)], ((0,), (1,), (2,)))
    data = Given([], [], (), {"plain": plain})
    with pytest.raises(ValueError, match="set='plain': its images have no texture"):
        ShapeBias(set="plain").check_data(Told(3), data)
    with pytest.raises(ValueError, match="models of 3 classes, and this one has 10"):
        ShapeBias(set="plain").check_data(Told(10), data)
    agree = a_set([[1, 2, 3]], [(1, 1)], ((0,), (1,), (2,)), pairs=True)
    data = Given([], [], (), {"cues": agree})
    with pytest.raises(ValueError, match="no image whose cues disagree"):
        ShapeBias().measure(told(3), data)
    with pytest.raises(ValueError, match="examples=-1"):
        ShapeBias(examples=-1)
