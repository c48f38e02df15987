# SPDX-License-Identifier: Apache-2.0
"""Images under a hierarchy: their latents are those that they state."""

import itertools

import numpy as np
import pytest

from mim_jax import config
from mim_jax.data.pipeline import train_batches
from mim_jax.data.sources import drawings
from mim_jax.data.sources.hierarchy import Hierarchy

KINDS = ("symbols", "scene", "cascade")


def tokens_of(image, token=4):
    """Pixel values of each token, by loops."""
    rows, cols = image.shape[0] // token, image.shape[1] // token
    values = image.astype(float) / 255 * 8 - 4
    return np.stack(
        [
            values[token * r : token * (r + 1), token * c : token * (c + 1)].ravel()
            for r, c in itertools.product(range(rows), range(cols))
        ]
    )


@pytest.mark.parametrize("kind", ["symbols", "scene"])
@pytest.mark.parametrize("shift", [False, True])
def test_tokens_have_their_textures_and_parents_their_synonyms(kind, shift):
    source, noise = Hierarchy(kind=kind, shift=shift), []
    rules = source.grammar.rules
    for index in range(12):
        record = source[index]
        assert record["label"] == record["level_3"][0, 0] == source.labels()[index]
        below = record["level_0"].ravel()
        noise.append(tokens_of(record["image"]) - source.textures[below])
        for level, tree in enumerate(record["tree"], 1):
            symbols = record[f"level_{level}"].ravel()
            assert len(np.unique(tree)) == len(symbols)
            if level > 1:  # the same node is above both, one level apart
                inner = record["tree"][level - 2].ravel()
                pairs = set(zip(inner.tolist(), tree.ravel().tolist(), strict=True))
                assert len(pairs) == len(np.unique(inner))
        # Of each node, the four children, found by `tree` alone.
        for node in range(16):
            children = below[record["tree"][0].ravel() == node]
            synonyms = rules[2][record["level_1"].ravel()[node]]
            options = {tuple(sorted(one)) for one in synonyms.tolist()}
            assert tuple(sorted(children.tolist())) in options
            if not shift:
                assert children.tolist() in synonyms.tolist()
    spread = np.std(noise) if kind == "symbols" else np.median(np.abs(noise)) / 0.6745
    assert spread == pytest.approx(0.3, rel=0.03)


def test_a_shift_moves_image_and_tree_together():
    still, moved = (
        Hierarchy(kind="scene", noise=0.0),
        Hierarchy(kind="scene", noise=0.0, shift=True),
    )
    shifts = set()
    for index in range(20):
        one, other = still[index], moved[index]
        found = [
            shift
            for shift in itertools.product(range(8), repeat=2)
            if np.array_equal(np.roll(one["tree"], shift, (1, 2)), other["tree"])
        ]
        (shift,) = found
        pixels = [4 * step for step in shift]
        assert np.array_equal(np.roll(one["image"], pixels, (0, 1)), other["image"])
        assert np.array_equal(np.roll(one["level_0"], shift, (0, 1)), other["level_0"])
        for level in (1, 2, 3):
            assert np.array_equal(one[f"level_{level}"], other[f"level_{level}"])
        shifts.add(shift)
    assert len(shifts) > 12
    # The same hidden tokens leave the same open, wherever the image is.
    mask = np.random.default_rng(0).random((3, 8, 8)) < 0.75
    mask[1:] = mask[0]
    rolled = []
    for index in range(3):
        (shift,) = (
            shift
            for shift in itertools.product(range(8), repeat=2)
            if np.array_equal(
                np.roll(still[0]["tree"], shift, (1, 2)), moved[index]["tree"]
            )
        )
        rolled.append(np.roll(mask[index], shift, (0, 1)))
    want = still.bounds(mask.reshape(3, 64))
    found = moved.bounds(np.array(rolled).reshape(3, 64))
    assert found.optimum == pytest.approx(want.optimum, rel=1e-12)


def test_who_looks_at_nothing_does_not_know_the_shift():
    source = Hierarchy(seed=3, shift=True)
    mask = np.tile(np.random.default_rng(0).permutation(64) < 48, (300, 1))
    pixels = np.array([tokens_of(source[i]["image"]) for i in range(300)])
    blind = pixels - pixels.mean(axis=(0, 1))
    error = (blind**2).mean(axis=-1)[mask].mean()
    assert source.bounds(mask).floor == pytest.approx(error, rel=0.01)
    # Knowing a token's place in the hierarchy would be worth more than that.
    assert Hierarchy(seed=3).bounds(mask).floor < 0.98 * error


def test_bounds_hold_for_the_images_as_they_are():
    source = Hierarchy(seed=3)
    mask = np.tile(np.random.default_rng(0).permutation(64) < 48, (300, 1))
    found = source.bounds(mask)
    symbols = np.array([source[i]["level_0"] for i in range(300)])
    best = source.grammar.posterior(symbols, mask.reshape(300, 8, 8))[-1]
    guess = (best @ source.textures).reshape(300, 64, -1)
    pixels = np.array([tokens_of(source[i]["image"]) for i in range(300)])
    errors = ((pixels - guess) ** 2).mean(axis=-1)
    assert errors[mask].mean() == pytest.approx(found.optimum, rel=0.03)
    blind = pixels - pixels.mean(axis=0)
    assert (blind**2).mean(axis=-1)[mask].mean() == pytest.approx(found.floor, rel=0.02)


def test_a_cascade_keeps_its_share_of_the_parent():
    source = Hierarchy(kind="cascade", inherit=0.8, dimension=3, noise=0.0)
    records = [source[i] for i in range(400)]
    for level in (3, 2, 1):
        above = np.array([r[f"level_{level}"] for r in records])
        below = np.array([r[f"level_{level - 1}"] for r in records])
        for down, right in itertools.product((0, 1), repeat=2):
            child = below[:, down::2, right::2].reshape(-1, 3)
            parent = np.tanh(above).reshape(-1, 3)
            turn, *_ = np.linalg.lstsq(parent, child, rcond=None)
            np.testing.assert_allclose(turn @ turn.T, 0.64 * np.eye(3), atol=0.3)
            rest = child - parent @ turn
            np.testing.assert_allclose(np.cov(rest.T), 0.36 * np.eye(3), atol=0.08)
    root = np.array([r["level_3"].ravel() for r in records])
    np.testing.assert_allclose(np.cov(root.T), np.eye(3), atol=0.25)
    # Pixels are linear in the vectors of their tokens.
    vectors = np.concatenate([r["level_0"].reshape(64, 3) for r in records[:9]])
    pixels = np.concatenate([tokens_of(r["image"]) for r in records[:9]])
    inside = np.abs(pixels).max(axis=1) < 3.9
    fit, *_ = np.linalg.lstsq(vectors[inside], pixels[inside], rcond=None)
    rest = pixels[inside] - vectors[inside] @ fit
    assert np.abs(rest).max() < 0.02  # rounding to uint8


def test_tokens_of_scenes_are_told_apart():
    grammar, textures = drawings.grammar()
    values = 8 * textures
    apart = ((values[:, None] - values[None]) ** 2).sum(axis=-1) ** 0.5
    np.fill_diagonal(apart, np.inf)
    assert apart.min() / 2 > 3 * 0.3  # half the way, in deviations of the noise
    for rule in grammar.rules[:1]:  # different scenes never have the same things
        assert len({tuple(one) for one in rule.reshape(-1, 4).tolist()}) == 18
    assert grammar.tokens == 8 and len(drawings.SCENES) == len(grammar.rules[0])


@pytest.mark.parametrize("kind", KINDS)
def test_splits_seeds_and_records_differ(kind):
    source = Hierarchy(kind=kind)
    others = (source.held_out(), Hierarchy(kind=kind, seed=1))
    images = [source[0], source[8 if kind != "scene" else 6]]
    images += [other[0] for other in others]
    for one, other in itertools.combinations(images, 2):
        assert (one["image"] != other["image"]).mean() > 0.1
    with pytest.raises(IndexError, match="index=100000: want 0 <= index < 100000"):
        source[100_000]


def test_the_numbers_of_a_record_never_change():
    record = Hierarchy()[5]
    want = [[7, 3, 2, 3], [7, 3, 5, 0], [0, 3, 6, 5], [1, 2, 3, 0]]
    assert record["level_1"].tolist() == want
    assert record["image"][0, :4, 0].tolist() == [125, 120, 97, 134]


def test_the_variant_shows_the_images_whole():
    tree = config.read("configs/mae.py:hierarchy")
    made = config.build(tree)
    source = made.data.source
    with train_batches(made.data, seed=0, batch_size=4, stop=1) as batches:
        batch = next(batches)
    for row, index in enumerate(batch["index"]):
        record = source[int(index)]
        for name in ("image", "tree", "level_0", "level_3"):
            np.testing.assert_array_equal(batch[name][row], record[name])
    # In these units the loss is the squared error of pixel values.
    assert made.objective.mean == (0.5,) * 3 and made.objective.std == (0.125,) * 3
    assert not made.objective.normalise_target


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(kind="scene", levels=2), "levels=2, token=4 of kind='scene': want lev"),
        (dict(symbols=2, synonyms=9), "synonyms=9 of symbols=2: want at most 8"),
        (dict(split="test"), "split='test' is unknown"),
    ],
)
def test_what_cannot_be_drawn_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Hierarchy(**fields)


def test_a_cascade_has_no_exact_bounds():
    with pytest.raises(ValueError, match="kind='cascade' has no grammar: want kind="):
        Hierarchy(kind="cascade").bounds(np.ones((1, 64), bool))
