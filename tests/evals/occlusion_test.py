# SPDX-License-Identifier: Apache-2.0
"""The occlusion report against features computed by hand, and where nothing is lost."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from passes import Given
from sklearn.linear_model import Ridge
from small_run import CMAE_SMALL, batches, passes, run

from mim_jax.evals import occlusion
from mim_jax.evals.cka import CKA
from mim_jax.evals.images import keys_of
from mim_jax.evals.occlusion import Occlusion, compared
from mim_jax.evals.report import mean_share, share_of
from mim_jax.maskings.random import Random
from mim_jax.objectives.cmae import CMAE
from mim_jax.ops.masking import no_mask
from mim_jax.ops.patches import grid_of

GRID = grid_of(8, 8, 2)
HALF = Occlusion(ratios=(0.5,), draws=1, penalties=(0.1,))


class Deaf(CMAE):
    """Its encoder sees the whole image, whatever is hidden from it."""

    def encode(self, params, images, keep=None, hidden=None, taps=(), keys=None):
        return super().encode(params, images, taps=taps)


class Nothing(Random):
    """Hides nothing."""

    def visible_count(self, grid):
        return grid.size

    def __call__(self, keys, grid):
        return no_mask(len(keys), grid)


def with_objective(kind):
    fields = {f.name: getattr(CMAE_SMALL, f.name) for f in dataclasses.fields(CMAE)}
    return dataclasses.replace(run(), objective=kind(**fields))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def check_that_nothing_is_lost(report):
    numbers = report.scalars
    for who in ("model", "untrained"):
        for quantity in ("cosine", "cka", "retrieval"):
            found = report.arrays[f"{quantity}_{who}"]
            assert found.shape == (1, 3)  # two blocks, and what represents an image
            np.testing.assert_allclose(found, 1, atol=1e-5)
        full, masked = (f"accuracy_{who}_{end}" for end in ("full", "ratio0.5"))
        assert numbers[masked] == numbers[full] > 0.5


@pytest.mark.parametrize("how", ["drop", "mask_token", "zero"])
def test_all_is_one_where_no_patch_is_hidden(how, monkeypatch):
    monkeypatch.setattr(occlusion, "Random", Nothing)
    report = dataclasses.replace(HALF, occlusion=how).measure(run(), passes())
    assert report.arrays["hidden_share"].tolist() == [0]
    check_that_nothing_is_lost(report)


def test_all_is_one_for_an_encoder_that_sees_what_is_hidden():
    evaluation = dataclasses.replace(HALF, occlusion="drop", draws=2)
    report = evaluation.measure(with_objective(Deaf), passes())
    assert report.arrays["hidden_share"].tolist() == [0.5]
    check_that_nothing_is_lost(report)


@functools.cache
def measured():
    return HALF.measure(run(), passes())


@functools.cache
def by_hand():
    """(full, masked) features of the held-out images: mean visible patch token of each
    block, then the mean patch token; and the features of training images."""
    data, params = passes(), run().params
    encode = jax.jit(
        lambda pixels, hidden=None: CMAE_SMALL.encode(
            params, pixels, hidden=hidden, taps=("blocks",)
        )
    )
    full, masked = [], []
    for batch in data.batches:
        pixels = jnp.asarray(batch["image"], jnp.float32) / 255
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys_of(batch, 0), 0)
        hidden = Random(ratio=0.5)(keys, GRID).hidden
        for found, given in ((full, None), (masked, hidden)):
            tokens, seen = encode(pixels, given)
            shown = np.ones(hidden.shape) if given is None else ~np.asarray(given)
            weights = (shown / shown.sum(axis=1, keepdims=True))[None, :, :, None]
            layers = (np.asarray(seen["blocks"], np.float64)[:, :, 1:] * weights).sum(2)
            last = np.asarray(tokens, np.float64)[:, 1:].mean(axis=1)
            found.append(np.concatenate([layers, last[None]])[:, batch["valid"]])
    train = [
        np.asarray(encode(jnp.asarray(batch["image"], jnp.float32) / 255)[0])[
            batch["valid"], 1:
        ].mean(axis=1)
        for batch in data.training
    ]
    return (*(np.concatenate(part, axis=1) for part in (full, masked)), train)


def test_cosines_and_retrieval_by_hand():
    full, masked, _ = by_hand()
    arrays = measured().arrays
    assert arrays["occlusion"].item() == "mask_token"  # as C-MAE hides patches
    similar = unit(masked) @ unit(full).transpose(0, 2, 1)
    own = similar[:, np.arange(24), np.arange(24)]
    np.testing.assert_allclose(arrays["cosine_model"][0], own.mean(1), rtol=1e-4)
    np.testing.assert_allclose(
        arrays["cosine_of_images_model"][0], own[-1], rtol=1e-4, atol=1e-5
    )
    others = (similar.sum(axis=2) - own).mean(axis=1) / 23
    np.testing.assert_allclose(arrays["cosine_others_model"][0], others, rtol=1e-4)
    hits = (similar.argmax(axis=2) == np.arange(24)).mean(axis=1)
    np.testing.assert_allclose(arrays["retrieval_model"][0], hits, atol=1e-12)
    assert 0 < hits[-1] < 1
    number = measured().numbers["cosine_model_ratio0.5"]
    spread = own[-1].std(ddof=1) / 24**0.5
    # Student's t with 23 degrees of freedom.
    want = own[-1].mean() + np.array([-1, 1]) * 2.0686576 * spread
    np.testing.assert_allclose(number.interval, want, rtol=1e-4)
    assert measured().scalars["retrieval_chance"] == 1 / 24


def test_the_probe_is_scikit_learns_and_never_sees_a_masked_image():
    full, masked, train = by_hand()
    x = unit(np.concatenate(train).astype(np.float64))
    labels = np.concatenate([b["label"][b["valid"]] for b in passes().training])
    size = ((x - x.mean(axis=0)) ** 2).sum() / len(x)
    probe = Ridge(alpha=0.1 * size).fit(x, np.eye(3)[labels])
    held_out, full_right = np.arange(24) % 3, None
    for features, key in ((full, "full"), (masked, "ratio0.5")):
        right = probe.predict(unit(features[-1])).argmax(axis=1) == held_out
        full_right = right if features is full else full_right
        number = measured().numbers[f"accuracy_model_{key}"]
        assert (number.value, number.n) == (right.mean(), 24)
        assert number.interval == pytest.approx(share_of(right).interval)
    np.testing.assert_array_equal(
        measured().arrays["accuracy_of_images_model"][0], right
    )
    # Features have length 1 for it: else the bias would decide about short ones.
    answer = HALF._probe(CMAE_SMALL, run().params, passes())
    short = 1e-4 * full[-1].astype(np.float32)
    np.testing.assert_array_equal(answer(short) == held_out, full_right)


def test_cka_of_blocks_is_that_of_its_own_evaluation():
    evaluation = Occlusion(ratios=(0.3, 0.7), occlusion="drop", draws=1)
    found = evaluation.measure(run(), passes()).arrays["cka_model"]
    want = CKA(ratios=(0.3, 0.7), occlusion="drop").measure(run(), passes())
    np.testing.assert_allclose(found[:, :-1], want.arrays["cka"], rtol=1e-5)


def test_more_draws_are_other_masks_of_the_same_images():
    one, two = (
        dataclasses.replace(HALF, draws=draws).measure(run(), passes())
        for draws in (1, 2)
    )
    first, mean = (x.arrays["cosine_of_images_model"] for x in (one, two))
    assert first.shape == mean.shape == (1, 24) and (first != mean).any()
    second = 2 * mean - first  # of the second draw alone
    assert np.abs(first - second).max() > 1e-3 and (second <= 1 + 1e-6).all()
    assert two.numbers["cosine_model_ratio0.5"].n == 24


def test_retrieval_of_orthogonal_features():
    bank = np.eye(6)[None]
    for own, want in ((np.arange(6), 1.0), (np.arange(6)[::-1], 0.0)):
        found = compared(bank, bank, own)
        np.testing.assert_array_equal(found.hits, np.full((1, 6), want))
        np.testing.assert_allclose(found.cosine, np.full((1, 6), want))
        np.testing.assert_allclose(found.others, np.full((1, 6), (1 - want) / 5))


def test_features_that_tell_nothing_are_retrieved_by_chance():
    same = np.full((1, 5, 4), 0.5, np.float32)
    np.testing.assert_allclose(compared(same, same, np.arange(5)).hits, 1 / 5)
    # Two images that are equal share their hits; the rest is found.
    bank = np.eye(4)[None, [0, 0, 1, 2]]
    hits = compared(bank, bank, np.arange(4)).hits
    np.testing.assert_allclose(hits, [[0.5, 0.5, 1, 1]])


def test_images_without_labels_have_no_accuracy_and_a_picture():
    report = HALF.measure(run(), Given(batches(9)))
    assert not any("accuracy" in name for name in report.numbers)
    assert report.scalars["images"] == 9
    figures = HALF.draw({"x": report})
    assert len(figures["occlusion"].axes) == 3
    assert len(HALF.draw({"x": measured()})["occlusion"].axes) == 4
    two = HALF.draw({"x": report, "y": measured()})
    assert two.keys() == {"occlusion", "occlusion_blocks0", "occlusion_blocks1"}


def test_the_curve_of_cosines_begins_at_other_images_and_ends_at_one():
    cosine, *_ = HALF.draw({"x": measured()})["occlusion"].axes
    trained, untrained = cosine.lines
    for line, who in ((trained, "model"), (untrained, "untrained")):
        own, others = (
            measured().scalars[f"{name}_{who}_ratio0.5"]
            for name in ("cosine", "cosine_others")
        )
        assert line.get_xdata().tolist() == [0.5]
        assert line.get_ydata()[0] == pytest.approx((own - others) / (1 - others))


def test_shares_have_the_interval_of_as_many_answers():
    right = [True] * 8 + [False] * 2
    one, other = mean_share(np.array(right, float)), share_of(right)
    assert (one.value, one.unit, one.n) == (0.8, other.unit, other.n)
    assert one.interval == pytest.approx(other.interval)
    mixed, ones = mean_share([1.0, 0.5, 0.5, 0.0]), mean_share([1.0] * 10)
    assert mixed.interval == pytest.approx(share_of([1, 1, 0, 0]).interval)
    assert ones.interval[0] == pytest.approx(0.7224672) and ones.interval[1] == 1


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(ratios=()), r"ratios=\(\): want at least one number"),
        (dict(ratios=(0.5, 1.0)), "want 0 < each < 1"),
        (dict(images=3), "images=3: want at least 4"),
        (dict(draws=0), "draws=0: want 1 <= draws"),
        (dict(training_images=0), "training_images=0: want at least 1"),
        (dict(penalties=(0.0,)), "want 1e-12 <= each"),
    ],
)
def test_fields_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        Occlusion(**fields)


def test_three_images_are_too_few():
    with pytest.raises(ValueError, match="3 held-out images: want at least 4"):
        HALF.measure(run(), Given(batches(3)))
