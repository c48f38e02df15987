# SPDX-License-Identifier: Apache-2.0
"""Numbers of evaluations worked out by hand, or by other libraries, on a small run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from passes import Given
from sklearn import linear_model
from sklearn.metrics import silhouette_score
from small_run import CMAE_SMALL, batches, passes, run

from mim_jax.evals import linear, ridge
from mim_jax.evals.attention import Attention, _entropy
from mim_jax.evals.cka import CKA
from mim_jax.evals.features import Features, extract
from mim_jax.evals.images import keys_of
from mim_jax.evals.knn import KNN
from mim_jax.evals.linear import Linear
from mim_jax.evals.occlusion import Occlusion
from mim_jax.evals.reconstruction import whole_image_scores
from mim_jax.evals.ridge import Ridge
from mim_jax.evals.tsne import TSNE
from mim_jax.maskings.random import Random
from mim_jax.ops.patches import grid_of
from mim_jax.optim import LARS, layer_scales
from mim_jax.state import stack_blocks


def test_the_rates_of_a_linear_probe_go_over_all_steps(monkeypatch):
    asked, real = [], linear._schedule

    def told(step, total):
        jax.debug.callback(lambda one: asked.extend(np.ravel(one).tolist()), step)
        assert total == 15
        return real(step, total)

    monkeypatch.setattr(linear, "_schedule", told)
    labels = np.arange(12, dtype=np.int32) % 3
    Linear(epochs=5, batch_size=4).fit(np.eye(12, dtype=np.float32), labels, 3, (1.0,))
    jax.effects_barrier()
    assert sorted(asked) == list(range(15))


def test_ridge_is_scikit_learns_and_counts_known_labels_alone(monkeypatch):
    rng = np.random.default_rng(0)

    def split(count):
        labels = np.arange(count, dtype=np.int32) % 3
        vectors = rng.normal(size=(count, 5)) + 1.5 * np.eye(5)[labels] + 1
        return Features(vectors.astype(np.float32), labels, np.arange(count))

    train, held_out = split(60), split(45)
    held_out.labels[:7] = -1
    monkeypatch.setattr(ridge, "extract_splits", lambda *_: (train, held_out))
    settings = Ridge(shots=(2,), draws=3, penalties=(0.1,))
    found = settings.measure(run(), Given([], [], ("a", "b", "c"))).numbers

    def unit(x):
        x = x.astype(np.float64)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    want = []
    for draw in range(3):
        rows = settings._chosen(train.labels, 3, 2, draw)
        x = unit(train.vectors[rows])
        size = ((x - x.mean(0)) ** 2).sum() / len(x)
        model = linear_model.Ridge(alpha=0.1 * size).fit(
            x, np.eye(3)[train.labels[rows]]
        )
        told = model.predict(unit(held_out.vectors)).argmax(1)
        want.append((told == held_out.labels)[7:].mean())
    assert found["accuracy_2_shot"].value == pytest.approx(np.mean(want))
    assert found["images"].value == 38


def test_neighbours_are_counted_for_known_labels_alone():
    data = passes()
    for batch in data.batches:
        batch["label"][::2] = -1
    known = sum(int((one["label"] >= 0)[one["valid"]].sum()) for one in data.batches)
    found = KNN(k=(3,), rows=2, neighbours=2).measure(run(), data).numbers
    assert found["accuracy_model_k3"].n == known
    assert found["accuracy_model_k3"].value > 0.8


def test_without_labels_in_training_there_is_no_accuracy_of_neighbours():
    data = passes()
    unknown = [one | {"label": np.full_like(one["label"], -1)} for one in data.batches]
    given = Given(data.batches, unknown, data.classes)
    found = KNN(k=(3,), rows=2, neighbours=2).measure(run(), given).numbers
    assert not any(name.startswith("accuracy") for name in found)


def test_fsimc_sees_a_change_of_colour_alone():
    rng = np.random.default_rng(0)
    reference = rng.uniform(0.3, 0.7, (1, 32, 32, 3)).astype(np.float32)
    # The luminance, .299 R + .587 G + .114 B, stays as it is.
    change = np.array([1 / 0.299, -1 / 0.587, 0], np.float32)
    pair = jnp.asarray(reference + 0.05 * change), jnp.asarray(reference)
    found = whole_image_scores(*pair)
    assert float(found["fsim"][0]) == pytest.approx(1, abs=1e-4)
    assert float(found["fsimc"][0]) < 0.99
    grey = whole_image_scores(*(one[..., :1] for one in pair))
    assert "fsim" in grey and "fsimc" not in grey


def test_the_untrained_curve_of_occlusion_is_that_of_the_first_parameters():
    measured = Occlusion(ratios=(0.5,), draws=1, penalties=(0.1,)).measure
    same = measured(run(), passes())
    other = measured(dataclasses.replace(run(), params=run().initial), passes())
    for name in ("cosine", "cosine_others", "cka", "cosine_of_images"):
        untrained = same.arrays[f"{name}_untrained"]
        np.testing.assert_array_equal(untrained, other.arrays[f"{name}_model"])
        assert (same.arrays[f"{name}_model"] != untrained).any()
    for end in ("full", "ratio0.5"):
        untrained = same.scalars[f"accuracy_untrained_{end}"]
        assert untrained == other.scalars[f"accuracy_model_{end}"]


def test_tsne_is_judged_on_the_features_that_it_draws():
    report = TSNE(classes=2, images=6, perplexity=3.0, seed=3).measure(run(), passes())
    chosen = report.arrays["chosen"]
    assert chosen.tolist() == [1, 2]  # not the first classes
    assert report.arrays["names"].tolist() == [("a", "b", "c")[one] for one in chosen]
    found = extract(CMAE_SMALL.features, run().params, passes().batches)
    rows = np.concatenate([np.flatnonzero(found.labels == one)[:6] for one in chosen])
    want = silhouette_score(found.vectors[rows], found.labels[rows], metric="cosine")
    assert report.scalars["silhouette"] == pytest.approx(want, rel=1e-5)
    assert report.scalars["images"] == 12


def test_entropy_is_a_share_of_the_largest():
    rows = np.array([[1, 1, 1, 1], [2, 2, 0, 0], [1, 2, 3, 4]], float)
    share = np.array([0.1, 0.2, 0.3, 0.4])
    last = -(share * np.log(share)).sum() / np.log(4)
    np.testing.assert_allclose(_entropy(rows), [1, 0.5, last], atol=1e-12)


def test_the_token_of_an_oblong_image_is_in_its_row_and_column():
    given = batches(4, 4, side=8)
    given[0]["image"] = given[0]["image"][:, :4]  # two rows of four patches
    report = Attention(rows=1, token=(0.99, 0.3)).measure(run(), Given(given))
    pixels = jnp.asarray(given[0]["image"][:1], jnp.float32) / 255
    _, seen = CMAE_SMALL.encode(run().params, pixels, taps=("attention",))
    last = np.asarray(seen["attention"])[-1, 0].mean(axis=0)
    found = report.arrays["chosen_token"][0].ravel()
    np.testing.assert_allclose(found, last[1 + 4 + 1, 1:], rtol=1e-4)
    assert report.arrays["place"].tolist() == [1, 1, 2]


@pytest.mark.parametrize("feature", ["cls", "visible_tokens"])
@pytest.mark.parametrize("occlusion", ["drop", "mask_token"])
def test_cka_is_that_of_the_tokens_by_hand(feature, occlusion):
    settings = CKA(ratios=(0.25,), feature=feature, occlusion=occlusion, images=12)
    found = settings.measure(run(), Given(batches(12, 12))).arrays["cka"][0]
    (batch,) = batches(12, 12)
    pixels = jnp.asarray(batch["image"], jnp.float32) / 255
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys_of(batch, 0), 0)
    mask = Random(ratio=0.25)(keys, grid_of(8, 8, 2))
    how = dict(keep=mask.keep) if occlusion == "drop" else dict(hidden=mask.hidden)

    def blocks(**how):
        _, seen = CMAE_SMALL.encode(run().params, pixels, taps=("blocks",), **how)
        return np.asarray(seen["blocks"], np.float64)

    full, part = blocks(), blocks(**how)
    if feature == "cls":
        pairs = full[:, :, 0], part[:, :, 0]
    else:  # a patch's token is at its place in `keep` if others are dropped
        places = [
            (row, int(patch), number if occlusion == "drop" else int(patch))
            for row, kept in enumerate(np.asarray(mask.keep))
            for number, patch in enumerate(kept)
        ]
        pairs = (
            np.stack([full[:, row, 1 + patch] for row, patch, _ in places], 1),
            np.stack([part[:, row, 1 + place] for row, _, place in places], 1),
        )
    for a, b, got in zip(*pairs, found, strict=True):
        a, b = a - a.mean(0), b - b.mean(0)
        both = ((a.T @ a) ** 2).sum() * ((b.T @ b) ** 2).sum()
        assert got == pytest.approx(((a.T @ b) ** 2).sum() / np.sqrt(both), rel=1e-4)


def test_lars_decays_and_scales_kernels_alone():
    params = {"kernel": jnp.array([[3.0, 4.0]]), "bias": jnp.array([2.0, 1.0])}
    slopes = {"kernel": jnp.array([[1.0, -1.0]]), "bias": jnp.array([0.5, 0.25])}
    tx = LARS(weight_decay=0.5, trust=0.1, momentum=0.0).build(lambda step: 0.2)
    updates, _ = tx.update(slopes, tx.init(params), params)
    whole = np.array([[1 + 1.5, -1 + 2.0]])
    want = -0.2 * 0.1 * 5 * whole / np.linalg.norm(whole)
    np.testing.assert_allclose(updates["kernel"], want, rtol=1e-6)
    np.testing.assert_allclose(updates["bias"], [-0.1, -0.05], rtol=1e-6)


def test_more_than_a_hundred_blocks_are_stacked_in_their_order():
    tree = {f"block{i:02d}": {"w": jnp.full(1, float(i))} for i in range(102)}
    stacked = stack_blocks(tree)["blocks"]["w"].ravel()
    np.testing.assert_array_equal(stacked, np.arange(102))


def test_relative_positions_learn_with_their_blocks():
    blocks = {f"block{i:02d}": {"w": jnp.ones((2, 2))} for i in range(3)}
    params = {"encoder": blocks | {"relative_positions": jnp.ones((3, 2, 5))}}
    scales = layer_scales(params, 0.5)["encoder"]["relative_positions"]
    found = np.broadcast_to(scales, (3, 2, 5))[:, 0, 0]
    np.testing.assert_allclose(found, [0.125, 0.25, 0.5])
