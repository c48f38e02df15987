# SPDX-License-Identifier: Apache-2.0
"""kNN, CKA, attention and t-SNE on a small encoder, against other ways to compute."""

import contextlib
import dataclasses
import io
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from passes import Given
from sklearn.neighbors import KNeighborsClassifier
from small_run import CMAE_SMALL, batches, passes, run

from mim_jax.evals.attention import Attention
from mim_jax.evals.cka import CKA
from mim_jax.evals.features import Features, extract
from mim_jax.evals.images import example_fields, keys_of, valid_images, watched
from mim_jax.evals.knn import KNN, classify
from mim_jax.evals.report import Report, mean_of, share_of
from mim_jax.evals.tsne import TSNE
from mim_jax.maskings.random import Random
from mim_jax.ops.patches import grid_of


def test_a_long_pass_without_a_terminal_prints_lines(monkeypatch, capsys):
    clock = itertools.count(0.0, 16.0)  # each batch takes 16 seconds
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    assert len(list(watched(batches(40, size=8), "knn"))) == 5
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["knn: 16 of 40 images", "knn: 32 of 40 images"]


def test_votes_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 90).astype(np.int32)
    vectors = rng.normal(size=(90, 5)) + np.eye(5)[labels]
    vectors = vectors.astype(np.float32)
    split = [
        Features(vectors[rows], labels[rows], np.arange(90)[rows])
        for rows in (slice(0, 60), slice(60, None))
    ]
    found = classify(split[0], split[1], [1, 7, 20], 0.07)
    for k, predicted in zip((1, 7, 20), found, strict=True):
        reference = KNeighborsClassifier(
            k,
            algorithm="brute",
            metric="cosine",
            weights=lambda apart: np.exp((1 - apart) / 0.07),
        ).fit(vectors[:60], labels[:60])
        np.testing.assert_array_equal(predicted, reference.predict(vectors[60:]))
    assert 0.3 < (found[1] == labels[60:]).mean() < 1


def test_images_without_a_label_do_not_vote():
    bank = Features(
        np.eye(3, dtype=np.float32), np.array([-1, 0, 1], np.int32), np.arange(3)
    )
    query = Features(
        np.array([[1, 0.2, 0.1]], np.float32), np.array([0], np.int32), np.arange(1)
    )
    assert classify(bank, query, [3], 0.07).tolist() == [[0]]


def test_padding_and_batch_size_change_no_feature():
    encode, params = CMAE_SMALL.features, run().params
    one, other = (extract(encode, params, batches(10, size)) for size in (10, 4))
    np.testing.assert_allclose(one.vectors, other.vectors, rtol=1e-5, atol=1e-6)
    assert one.labels.tolist() == other.labels.tolist() == [0, 1, 2] * 3 + [0]
    assert one.indices.tolist() == other.indices.tolist() == list(range(10))


def test_a_pass_gives_its_valid_rows_up_to_a_number():
    def rows_of(most, *valid):
        pass_ = ({"valid": np.array(one, bool)} for one in valid)
        given = list(valid_images(pass_, "example", most))
        return [rows.tolist() for _, rows in given], len(list(pass_))

    assert rows_of(None, [1, 0, 1], [0, 0, 0], [0, 1, 0]) == ([[0, 2], [1]], 0)
    # A batch that cannot be read does not end the pass; what is not needed is not read.
    assert rows_of(3, [0, 0], [1, 1], [1, 1], [1, 1]) == ([[0, 1], [0]], 1)
    for nothing in ([], [[0, 0]]):
        with pytest.raises(ValueError, match="example: the split has no images"):
            rows_of(3, *nothing)


def test_objectives_read_the_example_and_not_where_it_comes_from():
    batch = batches(4, 4)[0] | {
        "replaced": np.zeros(4, bool),
        "tree": np.zeros((4, 3), np.float32),
        "file": np.array(["a", "b", "c", "d"]),
    }
    assert example_fields(batch).keys() == {"image", "label", "tree"}


class Screen(io.StringIO):
    """Keeps what is written to it."""

    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


def test_a_terminal_sees_how_far_a_pass_is(monkeypatch):
    given = batches(10, 4)
    for terminal, most in ((True, None), (True, 5), (False, None)):
        screen = Screen(terminal)
        monkeypatch.setattr(sys, "stderr", screen)
        passed = list(watched(given, "features", most))
        assert all(one is other for one, other in zip(passed, given, strict=True))
        if terminal:  # 10 images in 3 batches of 4
            assert f"/{most or 12} " in screen.getvalue()
            assert "features" in screen.getvalue()
            # The last thing written wipes the line.
            assert screen.getvalue().rsplit("\r", 2)[1].strip() == ""
        else:
            assert screen.getvalue() == ""


def test_knn_tells_classes_that_are_easy_and_draws_them():
    report = KNN(k=(3, 500), rows=4, neighbours=2).measure(run(), passes())
    number = report.numbers["accuracy_model_k3"]
    assert number.n == 24 and number.unit == "share"
    assert number.interval[0] < number.value <= number.interval[1]
    assert "accuracy_model_k500" not in report.numbers
    assert report.arrays["queries"].shape == (4, 8, 8, 1)
    assert report.arrays["neighbours"].shape == (4, 2, 8, 8, 1)
    # The pictured neighbours are the training images that are most similar.
    encode, params = CMAE_SMALL.features, run().params
    train, held_out = (
        extract(encode, params, batches(40, 9, seed=1)),
        extract(encode, params, batches(24, 7)),
    )
    unit = [
        x.vectors / np.linalg.norm(x.vectors, axis=1)[:, None]
        for x in (train, held_out)
    ]
    nearest = (unit[1][0] @ unit[0].T).argmax()
    images = np.concatenate([batch["image"] for batch in batches(40, 9, seed=1)])
    np.testing.assert_array_equal(report.arrays["neighbours"][0, 0], images[nearest])
    assert KNN().draw({"x": report}).keys() == {"knn"}
    assert KNN().draw({"x": report, "y": report}).keys() == {"knn0", "knn1"}
    said = KNN(k=(3,)).sentence(report)
    assert said.startswith("3 nearest neighbours find ") and "untrained" in said
    alone = KNN(k=(3,), rows=4, neighbours=2, untrained=False)
    half = alone.measure(run(), passes())
    assert half.numbers["accuracy_model_k3"] == number
    assert "accuracy_untrained_k3" in report.numbers.keys() - half.numbers.keys()
    assert "untrained" not in alone.sentence(half)


def test_cka_hides_patches_as_it_is_told_or_as_the_model_does():
    def curves(occlusion, objective=CMAE_SMALL):
        evaluation = CKA(ratios=(0.5,), images=20, occlusion=occlusion)
        subject = dataclasses.replace(run(), objective=objective)
        report = evaluation.measure(subject, passes())
        assert report.numbers["images"].value == 20
        return report.arrays["cka"], report.arrays["occlusion"].item()

    assert CKA().occlusion == "drop"  # what configs without a value have always meant
    dropped, replaced = curves("drop"), curves("mask_token")
    for curve, _ in (dropped, replaced):
        assert curve.shape == (1, 2) and 0 < curve.min() <= curve.max() < 0.9999
    assert np.abs(dropped[0] - replaced[0]).max() > 1e-3
    # C-MAE hides by mask tokens, unless it is told not to.
    dropping = dataclasses.replace(CMAE_SMALL, mask_token=False, tokens="avg")
    for want, objective in ((replaced, CMAE_SMALL), (dropped, dropping)):
        found, how = curves("model", objective)
        np.testing.assert_array_equal(found, want[0])
        assert how == want[1]


@pytest.mark.parametrize("feature", ["mean", "cls", "visible_tokens"])
def test_cka_is_one_where_painting_changes_nothing(feature):
    """Images whose hidden half is the data's mean already: painting it is no change."""
    objective = dataclasses.replace(CMAE_SMALL, mean=(0.4,))  # 102 of 255
    data = batches(12, 12)
    evaluation = CKA(ratios=(0.5,), feature=feature, occlusion="zero", images=12)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys_of(data[0], 0), 0)
    mask = Random(ratio=0.5)(keys, grid_of(8, 8, 2))
    hidden = np.asarray(mask.hidden).reshape(12, 4, 4).repeat(2, 1).repeat(2, 2)
    changed = evaluation.measure(
        dataclasses.replace(run(), objective=objective), Given(data)
    )
    data[0]["image"][hidden] = 102
    same = evaluation.measure(
        dataclasses.replace(run(), objective=objective), Given(data)
    )
    np.testing.assert_allclose(same.arrays["cka"], 1, atol=1e-5)
    assert changed.arrays["cka"].max() < 0.9999


def test_cka_of_mask_tokens_needs_one():
    encoder = dict(run().params["encoder"])
    CKA(ratios=(0.5,), occlusion="mask_token", images=8).measure(run(), passes())
    del encoder["mask_token"]
    without = dataclasses.replace(run(), params={"encoder": encoder})
    with pytest.raises(ValueError, match="x has no mask token"):
        CKA(ratios=(0.5,), occlusion="mask_token").measure(without, passes())


def test_cka_of_many_runs_is_drawn_in_rows_of_panels():
    ratios = np.asarray([0.1, 0.7])
    reports = {
        name: Report(
            numbers={},
            arrays=dict(ratios=ratios, cka=np.full((2, 3), 0.5), occlusion="drop"),
        )
        for name in "abcdefg"
    }
    figure = CKA().draw(reports)["cka"]
    assert [axis.get_title()[0] for axis in figure.axes] == list("abcdefg")
    tops = {round(axis.get_position().y1, 3) for axis in figure.axes}
    assert len(tops) == 2
    alone = CKA().draw({"a": reports["a"]})["cka"]
    assert len(alone.axes) == 1
    widths = (alone.axes[0], figure.axes[0], figure.axes[-1])
    inches = [one.get_position().width * one.figure.get_figwidth() for one in widths]
    assert min(inches) > 0.8 * max(inches)  # panels stay as wide as that of one run


def test_attention_rows_and_the_marked_patch():
    report = Attention(rows=3, token=(0.0, 0.99)).measure(run(), passes())
    image = batches(24, 24)[0]["image"][:1]
    pixels = jnp.asarray(image, jnp.float32) / 255
    _, seen = jax.jit(
        lambda p: CMAE_SMALL.encode(run().params, p, taps=("attention",))
    )(pixels)
    last = np.asarray(seen["attention"])[-1, 0].mean(axis=0)
    found = report.arrays
    np.testing.assert_allclose(found["class_token"][0].ravel(), last[0, 1:], rtol=1e-4)
    # Patch in the first row and the last column: token 1 + 3.
    np.testing.assert_allclose(found["chosen_token"][0].ravel(), last[4, 1:], rtol=1e-4)
    assert found["place"].tolist() == [0, 3, 2]
    assert grid_of(8, 8, 2).size == found["class_token"][0].size
    entropy = report.numbers["attention_entropy_class_token"]
    assert 0 < entropy.value <= 1 and entropy.n == 24
    assert Attention().draw({"x": report, "y": report}).keys() == {"attention"}


class Turned(Given):
    """Gives the last batches first if asked to spread the classes."""

    def held_out(self, spread=False):
        return contextlib.nullcontext(self.batches[::-1] if spread else self.batches)


def test_pictures_of_attention_are_spread_over_the_order_of_the_source():
    evaluation, data = Attention(rows=3), passes()
    want = evaluation.measure(run(), data).arrays["images"]
    turned = Turned(data.batches, data.training, data.classes)
    got = evaluation.measure(run(), turned).arrays["images"]
    np.testing.assert_array_equal(got, want)


def test_some_images_are_taken_from_all_classes():
    data = passes()
    turned = Turned(data.batches, data.training, data.classes)
    for evaluation, key in (
        (CKA(ratios=(0.5,), images=8), "cka"),
        (Attention(rows=2, images=8), "images"),
    ):
        want = evaluation.measure(run(), Given(data.batches[::-1])).arrays[key]
        np.testing.assert_array_equal(
            evaluation.measure(run(), turned).arrays[key], want
        )
        first = evaluation.measure(run(), Given(data.batches)).arrays[key]
        assert (first != want).any()


def test_tsne_separates_what_is_separate():
    evaluation = TSNE(classes=3, images=8, perplexity=5.0)
    report = evaluation.measure(run(), passes())
    assert report.numbers["images"].value == 24
    assert report.numbers["linear_accuracy"].value > 0.8
    assert report.arrays["plane"].shape == (24, 2)
    assert evaluation.draw({"x": report}).keys() == {"tsne"}
    with pytest.raises(ValueError, match="classes=10: the source has 3"):
        TSNE().measure(run(), passes())
    with pytest.raises(ValueError, match="want 5 of each class"):
        TSNE(classes=3, perplexity=5.0).measure(run(), passes(held_out=9))


def test_means_and_shares_have_their_intervals():
    number = mean_of([1.0, 2.0, 3.0, 4.0], "dB")
    # Student's t with 3 degrees: 3.18245; deviation 1.29099, root of 4.
    assert number.value == 2.5 and number.n == 4
    assert number.interval == pytest.approx((2.5 - 2.05426, 2.5 + 2.05426), abs=1e-4)
    assert mean_of([1.0], "dB").interval is None
    # Wilson's score by its formula, 8 of 10.
    z, p, n = 1.959964, 0.8, 10
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    share = share_of([True] * 8 + [False] * 2)
    assert share.interval == pytest.approx((middle - half, middle + half), abs=1e-5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: KNN(k=()), "k=()"),
        (lambda: KNN(rows=0), "rows=0"),
        (lambda: CKA(ratios=(0.0,)), "want 0 < each < 1"),
        (lambda: CKA(images=3), "at least 4"),
        (lambda: Attention(token=(0.5, 1.5)), "want 0 <= each <= 1"),
        (lambda: TSNE(classes=1), "classes=1"),
    ],
)
def test_fields_out_of_range(call, message):
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value)
