# SPDX-License-Identifier: Apache-2.0
"""The reconstruction report against hand-made numbers and objectives that know all."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from passes import Given

from mim_jax.evals import reconstruction
from mim_jax.evals.base import Run
from mim_jax.evals.reconstruction import Reconstruction
from mim_jax.evals.report import Report
from mim_jax.models.decoder import Decoder
from mim_jax.models.vit import Encoder
from mim_jax.objectives.mae import MAE
from mim_jax.ops.masking import from_hidden
from mim_jax.ops.patches import Grid, normalise_patches, patchify, to_float, unpatchify

GRID = Grid(3, 4, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Oracle(MAE):
    """Predicts its target exactly, or only the number in its parameters."""

    def reconstruct(self, params, batch, mask):
        images = to_float(batch["image"])
        return images + params["offset"]


def _batch(rows, valid=None):
    rng = np.random.default_rng(0)
    image = rng.integers(20, 230, (rows, 8, 8, 3), np.uint8)
    valid = np.ones(rows, bool) if valid is None else valid
    return {"image": image, "index": np.arange(rows, dtype=np.int32), "valid": valid}


def _run(offset=0.1, **fields):
    encoder = Encoder(patch=4, width=8, depth=1, heads=2)
    decoder = Decoder(width=8, depth=1, heads=2)
    objective = Oracle(encoder=encoder, decoder=decoder, **fields)
    params = {"offset": jnp.asarray(offset)}
    initial = {"offset": jnp.asarray(offset * 10)}
    return Run(objective=objective, params=params, initial=initial, step=7, name="x")


def test_psnr_of_a_known_error():
    report = Reconstruction(inpainted=0).measure(_run(0.05), Given([_batch(5)]))
    assert report.scalars["images"] == 5
    # The error is .05 everywhere: -20 log10(.05) dB.
    assert report.scalars["psnr_model_db"] == pytest.approx(26.0206, abs=1e-3)
    assert report.scalars["psnr_untrained_db"] < 10


def test_pasted_images_err_where_patches_are_hidden():
    report = Reconstruction(inpainted=0).measure(_run(0.05), Given([_batch(5)]))
    # Of four patches one is visible; the error is .05 everywhere else.
    assert report.scalars["masked_mse"] == pytest.approx(0.05**2, rel=1e-4)
    assert report.scalars["pasted_mse"] == pytest.approx(0.75 * 0.05**2, rel=1e-4)


def test_no_more_images_than_asked_for():
    report = Reconstruction(images=3, inpainted=9, rows=9).measure(
        _run(), Given([_batch(2), _batch(2), _batch(2)])
    )
    assert report.scalars["images"] == 3
    assert report.arrays["psnr_biharmonic_db"].shape == (3,)


def test_some_images_are_taken_from_all_classes_and_shown_in_order():
    class Spread(Given):
        def held_out(self, spread=False):
            assert spread
            return super().held_out()

    batch = _batch(6)
    batch["index"] = np.array([4, 0, 5, 2, 1, 3], np.int32)
    report = Reconstruction(images=4, inpainted=0, rows=3).measure(
        _run(), Spread([batch])
    )
    # The first three of the pass, of which the second is the first of the source.
    want = batch["image"][[1, 0, 2]].astype(np.float32) / 255
    np.testing.assert_array_equal(report.arrays["panel_original"], want)
    scores = report.arrays["psnr_model_db"][[1, 0, 2]]
    np.testing.assert_array_equal(report.arrays["panel_psnr"], scores)


def test_visible_mean_by_hand():
    hidden = np.zeros((1, 12), bool)
    hidden[0, [1, 5, 11]] = True
    images = np.random.default_rng(1).random((1, 6, 8, 2)).astype(np.float32)
    seen = np.ones((6, 8), bool)
    for patch in (1, 5, 11):
        row, col = divmod(patch, 4)
        seen[2 * row : 2 * row + 2, 2 * col : 2 * col + 2] = False
    mask = from_hidden(hidden)
    region = reconstruction.hidden_pixels(mask, GRID)
    np.testing.assert_array_equal(region[0], ~seen)
    filled = reconstruction.visible_mean(jnp.asarray(images), region)
    np.testing.assert_allclose(
        filled[0], np.broadcast_to(images[0][seen].mean(axis=0), (6, 8, 2)), rtol=1e-5
    )


def test_patch_mean_is_the_mean_colour_of_each_patch():
    images = np.random.default_rng(2).random((2, 6, 8, 3)).astype(np.float32)
    filled = np.asarray(reconstruction.patch_means(jnp.asarray(images), GRID))
    for row in range(0, 6, 2):
        for col in range(0, 8, 2):
            place = np.s_[:, row : row + 2, col : col + 2]
            want = images[place].mean(axis=(1, 2), keepdims=True)
            want = np.broadcast_to(want, (2, 2, 2, 3))
            np.testing.assert_allclose(filled[place], want, rtol=1e-5)


def test_patch_mean_of_grey_images_is_the_zero_prediction():
    """With normalised targets, predicting 0 gives each patch's true mean."""
    images = np.random.default_rng(2).random((2, 6, 8, 1)).astype(np.float32)
    filled = reconstruction.patch_means(jnp.asarray(images), GRID)
    patches = patchify(jnp.asarray(images), 2)
    zero = jnp.zeros_like(normalise_patches(patches)) + patches.mean(-1, keepdims=True)
    np.testing.assert_allclose(filled, unpatchify(zero, GRID), rtol=1e-6)


def test_the_baseline_of_normalised_runs_is_named():
    report = Reconstruction(inpainted=0).measure(_run(), Given([_batch(2)]))
    assert "psnr_patch_mean_db" in report.scalars
    report = Reconstruction(inpainted=0).measure(
        _run(normalise_target=False), Given([_batch(2)])
    )
    assert "psnr_patch_mean_db" not in report.scalars


def test_inpainting_restores_a_smooth_image_and_keeps_what_is_known():
    row, col = np.mgrid[:16, :16] / 16
    image = np.stack([row, col, (row + col) / 2], axis=-1).astype(np.float32)
    hidden = np.zeros((16, 16), bool)
    hidden[4:8, 4:12] = True
    filled = reconstruction.inpaint(image, hidden)
    np.testing.assert_allclose(filled, image, atol=1e-3)
    np.testing.assert_array_equal(filled[~hidden], image[~hidden])


def test_masks_do_not_depend_on_the_model():
    """Trained and untrained models, and two runs, are measured on the same masks."""
    seen = []

    class Spy(Oracle):
        def mask(self, batch, keys, state=None):
            mask = super().mask(batch, keys, state)
            jax.debug.callback(lambda keep: seen.append(np.asarray(keep)), mask.keep)
            return mask

    run = _run()
    spy = Spy(
        **{f.name: getattr(run.objective, f.name) for f in dataclasses.fields(MAE)}
    )
    for offset in (0.1, 0.2):
        params = {"offset": jnp.asarray(offset)}
        Reconstruction(inpainted=0, draws=2).measure(
            dataclasses.replace(run, objective=spy, params=params), Given([_batch(3)])
        )
    jax.effects_barrier()
    assert len(seen) == 4
    np.testing.assert_array_equal(seen[:2], seen[2:])
    assert (seen[0] != seen[1]).any()


def _drawn(masks):
    """Labels of the picture's rows, for reports whose models hid these pixels."""
    images = np.zeros((2, 4, 4, 1), np.float32)
    found = {}
    for number, hidden in enumerate(masks):
        arrays = {"panel_original": images, "panel_model": images + 1}
        arrays |= {"panel_hidden": hidden, "panel_psnr": np.zeros(2)}
        found[f"run {number}"] = Report(numbers={}, arrays=arrays)
    figure = Reconstruction().draw(found)["reconstruction"]
    rows = [axis for axis in figure.axes if axis.get_ylabel()]
    return {axis.get_ylabel(): axis.images[0].get_array() for axis in rows}


def test_a_picture_shows_each_masking_above_the_models_that_had_it():
    left = np.zeros((2, 4, 4), bool)
    left[:, :, :2] = True
    rows = _drawn([left, left])
    assert list(rows) == ["seen", "run 0", "run 1", "original"]
    rows = _drawn([left, ~left])
    names = ["seen by\nrun 0", "run 0", "seen by\nrun 1", "run 1", "original"]
    assert list(rows) == names
    np.testing.assert_array_equal(rows["seen by\nrun 0"] == 0.5, left[0])
    np.testing.assert_array_equal(rows["seen by\nrun 1"] == 0.5, ~left[0])
    np.testing.assert_array_equal(rows["run 1"] == 1, ~left[0])


def test_the_title_names_baselines_and_the_images_that_were_inpainted():
    report = Reconstruction(draws=1, inpainted=2, rows=2).measure(
        _run(0.05), Given([_batch(5)])
    )
    title = Reconstruction().draw({"x": report})["reconstruction"].get_suptitle()
    words = " ".join(title.split())
    assert "higher is better: model 26.02, untrained" in words
    assert "(of 2 images: model there 26.02)" in words
    assert "untrained: the network before training" in words
    assert "patch mean: the true mean of each patch" in words
