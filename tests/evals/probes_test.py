# SPDX-License-Identifier: Apache-2.0
"""Linear and ridge probes, against numpy, scikit-learn and leaving images out."""

import numpy as np
import pytest
from passes import Given
from sklearn.linear_model import Ridge as SklearnRidge
from small_run import batches, passes, run

from mim_jax.evals import linear
from mim_jax.evals.features import Features, extract
from mim_jax.evals.linear import Linear, predict
from mim_jax.evals.ridge import Ridge, fit


def blobs(count: int, classes: int = 4, width: int = 6, spread: float = 1.0):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, count).astype(np.int32)
    centres = 2 * rng.normal(size=(classes, width))
    vectors = centres[labels] + spread * rng.normal(size=(count, width))
    return vectors.astype(np.float32), labels


# Linear.


def lars_by_hand(settings, vectors, labels, classes, rate, heads):
    """The same fit, float64, on the whole set as one batch: order does not matter."""
    kernel, bias = (np.asarray(x, np.float64) for x in heads)
    x, y = vectors.astype(np.float64), np.eye(classes)[labels]
    momentum = [np.zeros_like(kernel), np.zeros_like(bias)]
    for step in range(settings.epochs):
        warmup = settings.epochs / 9
        share = step / warmup
        if step >= warmup:
            progress = (step - warmup) / (settings.epochs - warmup)
            share = 0.5 * (1 + np.cos(np.pi * progress))
        logits = x @ kernel + bias
        chances = np.exp(logits - logits.max(axis=1, keepdims=True))
        chances /= chances.sum(axis=1, keepdims=True)
        slope = (chances - y) / len(y)
        grad = x.T @ slope
        grad *= 0.001 * np.linalg.norm(kernel) / np.linalg.norm(grad)
        for i, one in enumerate((grad, slope.sum(axis=0))):
            momentum[i] = 0.9 * momentum[i] + one
        lr = rate * len(y) / 256 * share
        kernel, bias = kernel - lr * momentum[0], bias - lr * momentum[1]
    return kernel, bias


def test_all_rates_are_fitted_as_each_alone_by_hand():
    vectors, labels = blobs(64)
    settings = Linear(epochs=60, batch_size=1000)
    start = settings.fit(vectors, labels, 4, (1e-12,))[0]  # where all of them begin
    assert abs(start[0].std() - 0.01) < 0.004 and np.abs(start[1]).max() < 1e-6
    rates = (0.5, 8.0, 400.0)
    found = settings.fit(vectors, labels, 4, rates)
    for rate, (kernel, bias) in zip(rates, found, strict=True):
        want = lars_by_hand(settings, vectors, labels, 4, rate, start)
        # Errors of float32 grow with the weights, whose length each step multiplies.
        within = 5e-3 * np.abs(want[0]).max()
        np.testing.assert_allclose(kernel, want[0], atol=within)
        np.testing.assert_allclose(bias, want[1], atol=within)
    right = [(predict(one, vectors) == labels).mean() for one in found]
    assert right[0] < 0.6 < 0.9 < right[2]


def test_an_epoch_reads_every_image_once():
    # One feature per image and class: what is not read has no gradient.
    vectors, labels = np.eye(12, dtype=np.float32), np.arange(12, dtype=np.int32) % 3
    settings = Linear(epochs=1, batch_size=4, trust=1e6)
    ((start, _),) = settings.fit(vectors, labels, 3, (1e-12,))
    ((kernel, _),) = settings.fit(vectors, labels, 3, (1e-3,))
    moved = np.abs(kernel - start).max(axis=1)
    # The first step of the warm-up has rate 0, but momentum carries it on.
    assert (moved > 1e-7).all()


def test_the_rate_is_chosen_on_training_images():
    report = Linear(batch_size=16).measure(run(), passes())
    numbers, arrays = report.numbers, report.arrays
    assert numbers["accuracy"].n == 24 and numbers["accuracy"].unit == "share"
    assert numbers["training_images"].value == 40
    assert numbers["accuracy_held_back"].n == 4
    assert arrays["accuracy_held_back"].shape == arrays["rates"].shape == (11,)
    best = arrays["accuracy_held_back"].max()
    assert numbers["accuracy_held_back"].value == best
    chosen = numbers["rate"].value
    assert arrays["accuracy_held_back"][list(arrays["rates"]).index(chosen)] == best
    assert numbers["accuracy"].value > 0.8  # classes differ in brightness
    figures = Linear().draw({"a": report, "b": report})
    assert len(figures["linear"].axes[0].lines) == 2


def test_held_out_labels_choose_nothing():
    data = passes()
    wrong = [part | {"label": (part["label"] + 1) % 3} for part in data.batches]
    reports = [
        Linear(batch_size=16).measure(run(), one)
        for one in (data, Given(wrong, data.training, data.classes))
    ]
    np.testing.assert_array_equal(*(r.arrays["accuracy_held_back"] for r in reports))
    assert reports[0].scalars["rate"] == reports[1].scalars["rate"]
    assert reports[1].scalars["accuracy"] < 0.3 < reports[0].scalars["accuracy"]


def test_images_that_choose_the_rate_are_not_fitted(monkeypatch):
    fitted, chosen = [], []
    fit, answer = Linear.fit, linear.predict

    def fit_and_tell(self, features, *rest):
        fitted.append(features)
        return fit(self, features, *rest)

    def predict_and_tell(head, features):
        chosen.append(features)
        return answer(head, features)

    monkeypatch.setattr(Linear, "fit", fit_and_tell)
    monkeypatch.setattr(linear, "predict", predict_and_tell)
    Linear(batch_size=16, epochs=1, rates=(1.0,)).measure(run(), passes())
    assert [len(rows) for rows in fitted] == [36, 40]
    assert [len(rows) for rows in chosen] == [4, 24]
    apart = np.abs(fitted[0][:, None] - chosen[0][None]).max(axis=-1)
    assert apart.min() > 0
    both = np.concatenate([fitted[0], chosen[0]])
    np.testing.assert_array_equal(np.sort(both, axis=0), np.sort(fitted[1], axis=0))


def test_features_are_divided_by_their_deviation(monkeypatch):
    """Two features that tell the classes equally well, one a thousand times as large:
    classifiers see both at the same size, by training statistics."""
    rng = np.random.default_rng(0)
    seen = []

    def vectors(count, shift):
        labels = np.arange(count, dtype=np.int32) % 2
        values = labels[:, None] + 0.3 * rng.normal(size=(count, 2)) + shift
        values = (values * [1.0, 1000.0] + [5.0, -70.0]).astype(np.float32)
        return Features(values, labels, np.arange(count))

    splits = vectors(80, 0.0), vectors(40, 0.5)
    monkeypatch.setattr(linear, "extract_splits", lambda *_: splits)
    monkeypatch.setattr(
        linear, "predict", lambda head, x: seen.append(x) or predict(head, x)
    )
    fit = Linear.fit
    monkeypatch.setattr(
        Linear, "fit", lambda self, x, *rest: seen.append(x) or fit(self, x, *rest)
    )
    data = Given([], [], ("a", "b"))
    Linear(rates=(1.0,), epochs=1).measure(run(), data)
    *_, bank, queries = seen  # of the last fit, and of the held-out images
    train, held_out = (part.vectors.astype(np.float64) for part in splits)
    want = [(x - train.mean(axis=0)) / train.std(axis=0) for x in (train, held_out)]
    np.testing.assert_allclose(bank, want[0], atol=1e-4)
    np.testing.assert_allclose(queries, want[1], atol=1e-4)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(rates=()), "rates="),
        (dict(rates=(0.1, 0.0)), "rates="),
        (dict(held_back=1.0), "held_back=1.0"),
        (dict(trust=0.0), "trust=0.0"),
        (dict(epochs=0), "epochs=0"),
    ],
)
def test_linear_refuses_what_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        Linear(**fields)


@pytest.mark.parametrize("evaluation", [Linear(), Ridge()], ids=["linear", "ridge"])
def test_sources_without_labels_are_refused(evaluation):
    unlabelled = Given(batches(9), batches(9))
    with pytest.raises(ValueError, match="a source with"):
        evaluation.measure(run(), unlabelled)


# Ridge.


@pytest.mark.parametrize("penalty", [1e-3, 0.1, 10.0])
def test_weights_are_those_of_scikit_learn(penalty):
    vectors, labels = blobs(40)
    (weights, bias), chosen = fit(vectors, labels, 4, (penalty,))
    assert chosen == penalty
    x = vectors.astype(np.float64)
    size = ((x - x.mean(axis=0)) ** 2).sum() / len(x)
    want = SklearnRidge(alpha=penalty * size).fit(x, np.eye(4)[labels])
    np.testing.assert_allclose(weights, want.coef_.T, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(bias, want.intercept_, rtol=1e-8, atol=1e-12)


def test_fewer_images_than_features():
    vectors, labels = blobs(8, width=30)
    (weights, bias), _ = fit(vectors, labels, 4, (0.1,))
    x = vectors.astype(np.float64)
    size = ((x - x.mean(axis=0)) ** 2).sum() / len(x)
    want = SklearnRidge(alpha=0.1 * size, solver="svd").fit(x, np.eye(4)[labels])
    np.testing.assert_allclose(weights, want.coef_.T, rtol=1e-7, atol=1e-10)


def test_the_penalty_is_the_one_with_the_least_error_of_images_left_out():
    vectors, labels = blobs(24, spread=3.0)
    penalties = tuple(10.0**i for i in range(-4, 4))
    x, y = vectors.astype(np.float64), np.eye(4)[labels]
    size = ((x - x.mean(axis=0)) ** 2).sum() / len(x)
    errors = []
    for penalty in penalties:
        total = 0.0
        for i in range(24):
            rest = np.arange(24) != i
            # Leaving out keeps the penalty as a number, not as a share.
            model = SklearnRidge(alpha=penalty * size).fit(x[rest], y[rest])
            total += ((model.predict(x[i : i + 1])[0] - y[i]) ** 2).sum()
        errors.append(total)
    _, chosen = fit(vectors, labels, 4, penalties)
    assert chosen == penalties[int(np.argmin(errors))]
    assert 0 < np.argmin(errors) < len(penalties) - 1


def test_ridge_counts_shots_and_draws():
    settings = Ridge(shots=(1, 3, 500), draws=4)
    report = settings.measure(run(), passes())
    assert {name for name in report.numbers if name.startswith("accuracy")} == {
        "accuracy_1_shot",
        "accuracy_3_shot",
    }
    assert report.numbers["accuracy_3_shot"].n == 4
    assert report.scalars["images"] == 24
    train = extract(run().objective.features, run().params, passes().training)
    rows = settings._chosen(train.labels, 3, 3, 0)
    assert np.bincount(train.labels[rows]).tolist() == [3, 3, 3]
    assert set(settings._chosen(train.labels, 3, 1, 0)) < set(rows)
    assert set(settings._chosen(train.labels, 3, 3, 1)) != set(rows)
    assert "ridge" in settings.draw({"a": report})


@pytest.mark.parametrize(
    "fields", [dict(shots=()), dict(draws=0), dict(penalties=(0.0,))], ids=str
)
def test_ridge_refuses_what_cannot_be(fields):
    with pytest.raises(ValueError, match="want (at least|1 <= |1e-12 <= )"):
        Ridge(**fields)
