# SPDX-License-Identifier: Apache-2.0
"""The gallery: the same pixels are hidden from every model, whatever its patches; what
is visible is the original; and the images are of all classes."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from mim_jax.data.input import Input
from mim_jax.data.passes import EvalPasses
from mim_jax.data.sources.digits import Digits
from mim_jax.data.sources.folder import Folder
from mim_jax.evals.base import Run
from mim_jax.evals.report import png
from mim_jax.evals.side_by_side import patches_of, picture, side_by_side
from mim_jax.maskings.random import Random
from mim_jax.models.decoder import Decoder
from mim_jax.models.vit import Encoder
from mim_jax.objectives.mae import MAE
from mim_jax.objectives.supervised import Supervised
from mim_jax.ops.patches import Grid

DIGITS = Input(source=Digits(), image_size=(8, 8), workers=0)


def model(patch: int, normalise: bool = False, **masking) -> Run:
    objective = MAE(
        encoder=Encoder(patch=patch, width=8, depth=1, heads=2),
        decoder=Decoder(width=8, depth=1, heads=2),
        masking=Random(**masking),
        normalise_target=normalise,
        mean=(0.3,),
        std=(0.4,),
    )
    batch = {"image": np.zeros((2, 8, 8, 1), np.uint8)}
    params, _ = jax.jit(objective.init)(jax.random.key(patch), batch)
    return Run(objective=objective, params=params, initial=params, step=3, name="x")


@pytest.fixture(scope="module")
def shown():
    read = EvalPasses(DIGITS).some_held_out(10)
    classifier = dataclasses.replace(
        model(2), objective=Supervised(encoder=Encoder(width=8, depth=1, heads=2))
    )
    whole = dataclasses.replace(
        model(2), objective=MAE(encoder=Encoder(patch=8, width=8, depth=1, heads=2))
    )
    bright = read | {"image": read["image"] // 2}
    models = {
        "classifier": (classifier, read),
        "squares": (model(2, ratio=0.5, unit=4), read),
        "large patches": (model(4, normalise=True), read),
        "whole image": (whole, read),
        "other crop": (model(2), bright),
    }
    return side_by_side(models, tuple("abcdefghij"), seed=1), read


def test_every_model_fills_in_the_same_pixels(shown):
    found, read = shown
    images = read["image"].astype(np.float32) / 255
    assert found.masked_as == "squares"
    assert list(found.filled) == ["squares", "large patches"]
    assert found.hidden.mean() == 0.5
    # Squares of 4 pixels, of which each image hides two.
    squares = found.hidden.reshape(10, 2, 4, 2, 4)
    assert (squares.all((2, 4)) == squares.any((2, 4))).all()
    hidden = found.hidden[..., None]
    for run, filled in found.filled.items():
        np.testing.assert_array_equal(filled[~found.hidden], images[~found.hidden])
        assert filled.min() >= 0 and filled.max() <= 1
        errors = ((filled - images) ** 2 * hidden).sum((1, 2, 3)) / hidden.sum(
            (1, 2, 3)
        )
        np.testing.assert_allclose(found.psnr[run], -10 * np.log10(errors), rtol=1e-5)
    a, b = found.filled.values()
    assert not np.allclose(a, b)
    np.testing.assert_array_equal(found.seen, np.where(hidden, 0.5, images))


def test_who_is_left_out_and_who_is_helped_is_said(shown):
    found, _ = shown
    assert found.helped == ("large patches",)
    assert found.reasons["classifier"] == "Supervised predicts no pixels"
    assert "patches have 8 x 8 pixels, and some" in found.reasons["whole image"]
    assert "another way than squares" in found.reasons["other crop"]
    assert set(found.reports) == set(found.filled)


def test_nobody_predicts_pixels(shown):
    _, read = shown
    objective = Supervised(encoder=Encoder(width=8, depth=1, heads=2))
    classifier = dataclasses.replace(model(2), objective=objective)
    assert side_by_side({"classifier": (classifier, read)}, (), 0) is None


def test_the_picture_has_a_row_for_each_image(shown):
    found, _ = shown
    figure = picture(found._replace(classes=("$a$",) * 10))
    axes = [axis for axis in figure.axes if axis.images]
    assert len(axes) == 10 * (2 + 2)
    assert axes[0].get_ylabel() == r"\$a\$"
    assert axes[2].get_xlabel() == f"{found.psnr['squares'][0]:.1f} dB"
    assert png(figure)[:4] == b"\x89PNG"


def test_a_patch_that_is_hidden_in_part_fits_no_mask():
    hidden = np.zeros((1, 4, 4), bool)
    hidden[0, :2, :2] = True
    assert patches_of(hidden, Grid(1, 1, 4)) is None
    np.testing.assert_array_equal(
        patches_of(hidden, Grid(4, 4, 1)), hidden.reshape(1, 16)
    )


def test_images_are_of_all_classes_in_their_order():
    batch = EvalPasses(DIGITS).some_held_out(200)
    assert batch["label"].tolist() == sorted([*range(10)] * 20)
    assert len(set(batch["index"].tolist())) == 200 and batch["valid"].all()
    with EvalPasses(DIGITS).held_out() as batches:
        first = next(iter(batches))
    (row,) = np.flatnonzero(batch["index"] == 0)
    np.testing.assert_array_equal(batch["image"][row], first["image"][0])


def test_images_of_a_folder_without_classes_come_from_all_of_it(tmp_path):
    for split, count in (("train", 3), ("val", 21)):
        (tmp_path / split).mkdir()
        for i in range(count):
            pixels = np.full((8, 8), 10 * i, np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / f"{i:02d}.png")
    source = Folder(path=str(tmp_path), channels=1)
    data = Input(source=source, image_size=(8, 8), workers=0)
    batch = EvalPasses(data).some_held_out(5)
    assert batch["index"].tolist() == [0, 5, 10, 15, 20]
    assert batch["image"][:, 0, 0, 0].tolist() == [0, 50, 100, 150, 200]
    assert len(EvalPasses(data).some_held_out(100)["index"]) == 21
