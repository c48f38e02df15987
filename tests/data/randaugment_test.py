# SPDX-License-Identifier: Apache-2.0
"""What RandAugment draws; another test compares its operations with timm's."""

import collections

import numpy as np
import pytest
from skimage import data

from mim_jax.data import randaugment
from mim_jax.data.input import Input
from mim_jax.data.pipeline import train_batches
from mim_jax.data.randaugment import OPERATIONS, RandAugment
from mim_jax.data.sources.digits import Digits
from mim_jax.data.sources.photos import Photos

IMAGE = data.astronaut()[100:124, 180:212]


@pytest.fixture
def calls(monkeypatch):
    """What the operations are called with: (name, share, sign)."""
    seen = []

    def operate(image, name, share, sign, fill):
        seen.append((name, share, sign))
        return image

    monkeypatch.setattr(randaugment, "operate", operate)
    return seen


def test_every_operation_is_drawn_as_often_as_every_other(calls):
    settings, rng = RandAugment(ops=2), np.random.default_rng(0)
    draws = 6000
    for _ in range(draws):
        settings(IMAGE, rng)
    # Half of the operations drawn are applied.
    assert abs(len(calls) / (2 * draws) - 0.5) < 5 * (0.25 / (2 * draws)) ** 0.5
    counts = collections.Counter(name for name, _, _ in calls)
    assert counts.keys() == OPERATIONS.keys() and len(counts) == 15
    want = len(calls) / 15
    assert all(abs(count - want) < 5 * want**0.5 for count in counts.values())
    signs = np.array([sign for _, _, sign in calls])
    assert set(signs) == {1, -1} and abs(signs.mean()) < 5 / len(signs) ** 0.5
    shares = np.array([share for _, share, _ in calls])
    assert abs(shares.mean() - 0.9) < 0.005 and abs(shares.std() - 0.05) < 0.005
    assert shares.max() <= 1


@pytest.mark.parametrize("p, applied", [(0.0, 0), (1.0, 300)])
def test_p_is_the_share_that_is_applied(calls, p, applied):
    settings, rng = RandAugment(ops=3, p=p), np.random.default_rng(0)
    for _ in range(100):
        settings(IMAGE, rng)
    assert len(calls) == applied


def test_without_operations_nothing_is_drawn():
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    assert RandAugment()(IMAGE, rng) is IMAGE
    assert rng.bit_generator.state == before


def test_the_pipeline_augments_training_images():
    data = Input(
        source=Photos(),
        image_size=(32, 32),
        workers=0,
        flip=False,
        crop_scale=(1.0, 1.0),
    )
    augmented = Input(
        source=Photos(),
        image_size=(32, 32),
        workers=0,
        flip=False,
        crop_scale=(1.0, 1.0),
        randaugment=RandAugment(ops=2, p=1.0),
    )
    found = []
    for one in (data, augmented, augmented):
        with train_batches(one, seed=0, batch_size=8, stop=1) as batches:
            found.append(np.array(next(batches)["image"]))
    plain, first, second = found
    assert (plain != first).any(axis=(1, 2, 3)).mean() > 0.7
    np.testing.assert_array_equal(first, second)


def test_grey_images_stay_grey_images():
    settings, rng = RandAugment(ops=2, p=1.0, fill=(0,)), np.random.default_rng(0)
    image = Digits()[3]["image"]
    for _ in range(60):
        out = settings(image, rng)
        assert out.shape == image.shape and out.dtype == np.uint8


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(magnitude=11.0), "magnitude=11.0: want 0 <= magnitude <= 10"),
        (dict(ops=-1), "ops=-1"),
        (dict(fill=(300,)), "fill=.*want 0 <= each <= 255"),
    ],
)
def test_settings_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RandAugment(**fields)


def test_images_of_other_channels_are_refused():
    with pytest.raises(ValueError, match="randaugment.fill=.* 1 channel"):
        Input(source=Digits(), randaugment=RandAugment(ops=1))
