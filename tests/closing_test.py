# SPDX-License-Identifier: Apache-2.0
"""What ends a run: several evaluations, and one line that says what was learned."""

import json

import jax
import pytest
from tiny import tree_of

from mim_jax import config, train
from mim_jax.evals.knn import KNN
from mim_jax.evals.reconstruction import Reconstruction
from mim_jax.evals.report import Number, Report


def report(**values: float) -> Report:
    return Report(numbers={key: Number(value, "1") for key, value in values.items()})


def test_pixels_stand_beside_what_filled_in_the_same_images():
    found = dict(psnr_model_db=15.0, psnr_untrained_db=8.0, psnr_visible_mean_db=9.0)
    said = Reconstruction().sentence(report(**found))
    assert said == "hidden pixels at 15.0 dB (untrained 8.0, visible mean 9.0)"
    # Inpainting saw some of the images: so the model's score is that of these.
    found |= dict(psnr_biharmonic_db=10.0, psnr_model_where_inpainted_db=14.0)
    assert Reconstruction().sentence(report(**found)) == (
        "hidden pixels at 14.0 dB (biharmonic inpainting 10.0, untrained 8.0, "
        "visible mean 9.0)"
    )
    # A model that was given the true mean and contrast says what the mean alone does.
    found = dict(psnr_model_db=15.0, psnr_untrained_db=8.0, psnr_visible_mean_db=9.0)
    found |= dict(psnr_patch_mean_db=13.7)
    assert Reconstruction().sentence(report(**found)) == (
        "hidden pixels at 15.0 dB (untrained 8.0, visible mean 9.0; with the true mean "
        "and contrast of patches, mean alone 13.7)"
    )


def test_neighbours_stand_beside_those_of_the_untrained_model():
    found = dict(accuracy_model_k20=0.8, accuracy_untrained_k20=0.5)
    assert KNN(k=(10, 20)).sentence(report(**found)) == (
        "20 nearest neighbours find 80.0% of the classes (untrained 50.0%)"
    )
    assert KNN().sentence(report(images=3)) == ""  # no labels


@pytest.mark.slow  # each change runs the main job, which ends so
def test_a_run_ends_with_all_that_it_names(tmp_path, capfd):
    tree = tree_of("mae", also=("reconstruction",))
    tree.steps, tree.batch_size = 2, 8
    tree.log.update(dict(tensorboard=False, progress="none"))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        train.run(tree, tmp_path / "run")
    folder = tmp_path / "run" / "report"
    neighbours = json.loads((folder / "knn.json").read_text())
    pixels = json.loads((folder / "reconstruction.json").read_text())
    assert (folder / "knn.png").exists() and (folder / "reconstruction.png").exists()
    line = capfd.readouterr().out.splitlines()[-1]
    shown = pixels["psnr_model_where_inpainted_db"], neighbours["accuracy_model_k5"]
    assert line.startswith(f"learned     5 nearest neighbours find {shown[1]:.1%} of ")
    assert f"; hidden pixels at {shown[0]:.1f} dB (biharmonic" in line


@pytest.mark.parametrize(
    "name, expected",
    [
        ("nkn", "config.also='nkn' is unknown; known: "),
        ("knn", "config.also='knn': it is the report already"),
    ],
)
def test_a_name_that_cannot_end_a_run(name, expected):
    with pytest.raises(config.ConfigError) as caught:
        config.build(tree_of("mae", also=(name,)))
    assert str(caught.value).startswith(expected)


def test_what_cannot_measure_the_objective_is_refused_before_training(tmp_path):
    tree = tree_of("supervised", also=("reconstruction",))
    with pytest.raises(
        config.ConfigError, match="config.also: reconstruction measures"
    ):
        train.run(tree, tmp_path / "run")
    assert not (tmp_path / "run").exists()
