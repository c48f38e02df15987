# SPDX-License-Identifier: Apache-2.0
"""Drawn cues: shape and texture each tell the class, and they can disagree."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from mim_jax.data.sets.conflicts import DrawnConflicts
from mim_jax.data.sources.cues import SHAPES, TEXTURES, Cues, render

COUNT = 240


def drawings(source, count=COUNT):
    return np.stack([source[i]["image"][..., 0] for i in range(count)]).astype(float)


def outline(images):
    """Where a drawing differs from its background, scaled to 16 x 16 points."""
    found = []
    for image in images:
        inside = np.abs(image - image[0, 0]) > 2
        rows, cols = np.nonzero(inside)
        inside = inside[rows.min() : rows.max() + 1, cols.min() : cols.max() + 1]
        # A grid of points over the box that the shape fills.
        y = np.linspace(0, inside.shape[0] - 1, 16).round().astype(int)
        x = np.linspace(0, inside.shape[1] - 1, 16).round().astype(int)
        found.append(inside[np.ix_(y, x)].ravel())
    return np.array(found, float)


def grain(images):
    """How neighbouring pixels of a drawing correlate, wherever they are."""
    found = []
    for image in images:
        inside = (np.abs(image - image[0, 0]) > 2).astype(float)
        values = np.where(inside > 0, image - image[inside > 0].mean(), 0)
        values /= values.std() + 1e-9
        row = []
        for down in range(-4, 5):
            for right in range(5):
                moved = np.roll(values, (down, right), (0, 1))
                both = inside * np.roll(inside, (down, right), (0, 1))
                row.append((values * moved * both).sum() / max(both.sum(), 1))
        found.append(row)
    return StandardScaler(with_std=False).fit_transform(np.array(found))


def knows(describe, neighbours=5):
    """A classifier of such descriptions, fitted to the training split."""
    train = Cues(images=800)
    model = KNeighborsClassifier(neighbours)
    return model.fit(describe(drawings(train, 800)), train.labels()[:800])


@pytest.mark.parametrize("cue, describe", [(0, outline), (1, grain)])
def test_either_cue_tells_the_class(cue, describe):
    model, held_out = knows(describe), Cues().held_out()
    found = model.predict(describe(drawings(held_out)))
    assert (found == held_out.labels()[:COUNT]).mean() > 0.9
    conflicts = DrawnConflicts(drawings=4)
    pairs = np.array([conflicts[i]["labels"] for i in range(len(conflicts))])
    found = model.predict(describe(drawings(conflicts, len(conflicts))))
    # The classifier follows its own cue and ignores the other one.
    assert (found == pairs[:, cue]).mean() > 0.85
    assert (found == pairs[:, 1 - cue]).mean() < 0.1


def test_drawings_are_pure_functions_of_their_numbers():
    one, other = Cues(seed=1), Cues(seed=2)
    np.testing.assert_array_equal(one[5]["image"], Cues(seed=1)[5]["image"])
    assert not np.array_equal(one[5]["image"], other[5]["image"])
    assert not np.array_equal(one[5]["image"], one.held_out()[5]["image"])
    assert one.fingerprint() != other.fingerprint()
    # Drawing 5 does not depend on how many drawings there are.
    np.testing.assert_array_equal(one[5]["image"], Cues(seed=1, images=8)[5]["image"])


def test_classes_are_balanced_and_drawings_differ():
    source = Cues()
    assert len(SHAPES) == len(TEXTURES) == len(source.classes) == 8
    assert np.bincount(source.labels()).tolist() == [500] * 8
    assert len({source[i]["image"].tobytes() for i in range(200)}) == 200


def test_rising_and_falling_stripes_are_mirror_images():
    # Rising stripes go from lower left to upper right: a step right and up changes
    # nothing.
    for texture, step in (("rising", -1), ("falling", 1)):
        image = render(SHAPES.index("square"), TEXTURES.index(texture), (0,))[..., 0]
        middle = image[8:24, 8:24].astype(float)
        along = np.abs(
            middle[1:-1, 1:-1] - np.roll(middle, (step, 1), (0, 1))[1:-1, 1:-1]
        )
        cross = np.abs(
            middle[1:-1, 1:-1] - np.roll(middle, (-step, 1), (0, 1))[1:-1, 1:-1]
        )
        assert along.mean() < 0.2 * cross.mean()


@pytest.mark.parametrize("fields", [dict(images=3), dict(seed=-1)])
def test_fields_out_of_range(fields):
    with pytest.raises(ValueError, match="want [08] <= (images|seed) <= "):
        Cues(**fields)
