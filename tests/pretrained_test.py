# SPDX-License-Identifier: Apache-2.0
"""An encoder without its data gives the features that evaluations use."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import PIL.Image
import pytest

import mim_jax
from mim_jax import config as configs
from mim_jax.data.passes import EvalPasses
from mim_jax.evals.features import extract
from mim_jax.run.checkpoint import CheckpointError
from mim_jax.run.parts import read_parts
from mim_jax.run.rundir import read_config

OLD = pathlib.Path(__file__).parent / "fixtures" / "old_runs"
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (21, 8, 8, 1), np.uint8)


def run_in(folder: pathlib.Path, name: str, **data) -> pathlib.Path:
    """A run of 8 x 8 images in `folder`, with other values under config.data."""
    run = shutil.copytree(OLD / name / "run", folder / name)
    config = json.loads((run / "config.json").read_text())
    config["data"] |= data
    (run / "config.json").write_text(json.dumps(config))
    return run


@pytest.fixture(scope="module")
def mae(tmp_path_factory):
    return run_in(tmp_path_factory.mktemp("runs"), "mae")


@pytest.fixture(scope="module")
def mocov3(tmp_path_factory):
    return run_in(tmp_path_factory.mktemp("runs"), "mocov3")


@pytest.fixture(scope="module")
def encoder(mae):
    return mim_jax.load_encoder(mae)


@pytest.mark.parametrize("name", ["mae", "mocov3"])
def test_features_are_those_of_evaluations(request, name):
    run = request.getfixturevalue(name)
    settings = configs.build(configs.load(run / "config.json"))
    _, found = read_parts(run)
    with EvalPasses(settings.data).held_out() as batches:
        batches = [
            {key: np.array(value) for key, value in batch.items()} for batch in batches
        ]
    theirs = extract(settings.objective.features, found["params"], batches)
    images = np.concatenate([batch["image"] for batch in batches])
    valid = np.concatenate([batch["valid"] for batch in batches])
    encoder = mim_jax.load_encoder(run)
    ours = encoder.features(images[valid])
    assert ours.dtype == np.float32 and ours.shape == (355, encoder.width)
    # MoCo v3 runs its blocks as a loop here, and one by one there.
    np.testing.assert_allclose(ours, theirs.vectors, rtol=1e-4, atol=1e-5)
    assert theirs.vectors.std(axis=0).min() > 1e-3  # not the same for all images


def test_the_encoder_says_what_it_is(mocov3, encoder):
    assert (encoder.image_size, encoder.channels, encoder.width) == ((8, 8), 1, 8)
    assert encoder.step == 10 and type(encoder.objective).__name__ == "MAE"
    assert encoder.params.keys() == {"encoder", "decoder"}
    assert "blocks" in mim_jax.load_encoder(mocov3).params["encoder"]  # scan=true


def test_the_data_need_not_be_here(tmp_path, encoder):
    source = {"name": "tfds", "dataset": "imagenet2012", "data_dir": "/nowhere"}
    run = run_in(tmp_path, "mae", source=source)
    with pytest.raises(configs.ConfigError, match="not prepared"):
        configs.build(configs.load(run / "config.json"))
    ours = mim_jax.load_encoder(run).features(IMAGES)
    np.testing.assert_array_equal(ours, encoder.features(IMAGES))


@pytest.mark.parametrize("size", [(20, 30), (30, 20), (6, 6)])
def test_other_sizes_are_resized_as_evaluation_does(tmp_path, size):
    images = RNG.integers(0, 256, (3, *size, 1), np.uint8)
    for part in ("train", "val"):
        (tmp_path / "images" / part).mkdir(parents=True)
        for number, image in enumerate(images):
            path = tmp_path / "images" / part / f"{number}.png"
            PIL.Image.fromarray(image[..., 0]).save(path)
    source = {"name": "folder", "path": str(tmp_path / "images"), "channels": 1}
    run = run_in(tmp_path, "mae", source=source, eval_crop_fraction=0.6)
    data = configs.build(configs.load(run / "config.json")).data
    with EvalPasses(data, batch_size=3).held_out() as batches:
        seen = [np.array(batch["image"]) for batch in batches]
    encoder = mim_jax.load_encoder(run)
    ours = encoder.features(images)
    np.testing.assert_array_equal(ours, encoder.features(seen[0]))
    assert not np.allclose(ours[0], ours[1])


@pytest.mark.parametrize("batch_size", [1, 3, 8, 21, 64])
def test_features_do_not_depend_on_the_batch_size(encoder, batch_size):
    found = encoder.features(IMAGES, batch_size=batch_size)
    one_by_one = [encoder.features(image[None])[0] for image in IMAGES]
    np.testing.assert_allclose(found, one_by_one, rtol=1e-5, atol=1e-5)


def test_few_sizes_are_compiled_and_none_is_larger_than_asked_for(mae, monkeypatch):
    sizes = []
    encoder = mim_jax.load_encoder(mae)
    features = type(encoder.objective).features

    def watched(self, params, images, keys=None):
        sizes.append(len(images))  # called when it is traced
        return features(self, params, images, keys)

    monkeypatch.setattr(type(encoder.objective), "features", watched)
    for count in range(1, 21):
        assert len(encoder.features(IMAGES[:count], batch_size=6)) == count
    assert sorted(sizes) == [1, 2, 4, 6]


KINDS = {
    "jax": jnp.asarray,
    "list": list,
    "strided": lambda x: np.repeat(x, 2, axis=0)[::2],
    "float32": lambda x: np.float32(x) / np.float32(255),
    "float64": lambda x: x / 255,
    "float16": lambda x: np.float16(x / 255),
    "bfloat16": lambda x: jnp.asarray(x / 255, jnp.bfloat16),
}


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_of_any_library_and_floats_are_the_same_images(encoder, kind):
    ours = encoder.features(KINDS[kind](IMAGES))
    rounding = {"float16": 1e-2, "bfloat16": 1e-1}
    tolerance = rounding[kind] if kind in rounding else 1e-5
    np.testing.assert_allclose(
        ours, encoder.features(IMAGES), rtol=tolerance, atol=tolerance
    )


FLOATS = np.full((3, 8, 8, 1), 0.5, np.float32)


def spoiled(value: float) -> np.ndarray:
    images = FLOATS.copy()
    images[1, 2, 3, 0] = value
    return images


@pytest.mark.parametrize("dtype", ["int32", "int8", "bool", "complex64", "object"])
def test_other_types_are_refused_by_name(encoder, dtype):
    with pytest.raises(TypeError, match=f"{dtype}: want uint8 in 0..255, or floats"):
        encoder.features(np.zeros((2, 8, 8, 1), dtype))


@pytest.mark.parametrize(
    "images, message",
    [
        (spoiled(255.0), r"image 1 has the value 255.0: want floats in 0..1; divide"),
        (spoiled(-0.01), r"image 1 has the value -0.01: .* np.clip"),
        (spoiled(np.nan), r"image 1 has the value nan: want floats in 0..1"),
        (spoiled(np.inf), r"image 1 has the value inf: want floats in 0..1"),
        (IMAGES[0], r"\[8, 8, 1\]: want \[images, rows, .*; images\[None\] is a batch"),
        (IMAGES[..., 0], r"\[21, 8, 8\]: want \[images, rows, columns, 1\]"),
        (IMAGES.repeat(3, axis=-1), r"\[21, 8, 8, 3\]: want \[.*, columns, 1\]"),
        (np.moveaxis(IMAGES, -1, 1), r"\[21, 1, 8, 8\]: .*; np.moveaxis\(images, 1,"),
        (IMAGES[:0], r"\[0, 8, 8, 1\]: want at least one image"),
        (IMAGES[:, :0], r"\[21, 0, 8, 1\]: want at least one image of at least one"),
        (np.zeros((1, 9, 8, 1)), "are 9 x 8: want the run's 8 x 8, or uint8 images"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_images_that_do_not_fit_are_refused_by_value(encoder, images, message):
    with pytest.raises(ValueError, match=message):
        encoder.features(images)


def test_a_batch_size_below_one_is_refused(encoder):
    with pytest.raises(ValueError, match="batch_size=0: want at least 1"):
        encoder.features(IMAGES, batch_size=0)


def test_the_objective_refuses_integers_too(encoder):
    """Without the checks of the tests, as in a program that uses the package."""
    images = jnp.asarray(IMAGES, jnp.int32)
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(TypeError, match="images are int32: want uint8 in 0..255"):
            encoder.objective.features(encoder.params, images)
        for dtype in (jnp.int32, jnp.uint8):
            with pytest.raises(TypeError, match=f"{dtype.dtype}: want floats in 0..1"):
                encoder.objective.encode(encoder.params, images.astype(dtype))
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_the_teacher_has_features_of_its_own(mocov3):
    encoder = mim_jax.load_encoder(mocov3, weights="teacher")
    assert encoder.step == 10
    _, found = read_parts(mocov3, parts=("params", "teacher"))
    assert "predictor" not in found["teacher"] and "predictor" in encoder.params
    features = jax.jit(encoder.objective.features)
    theirs = features(found["teacher"], jnp.asarray(IMAGES))
    ours = encoder.features(IMAGES)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    student = mim_jax.load_encoder(mocov3).features(IMAGES)
    assert np.abs(ours - student).max() > 1e-2


def test_initial_weights_are_those_of_the_seed(mocov3):
    encoder = mim_jax.load_encoder(mocov3, weights="initial")
    assert encoder.step == 0
    # Frozen parameters still have their first values.
    _, found = read_parts(mocov3)
    frozen = found["params"]["encoder"]["embed"]["kernel"]
    ours = encoder.params["encoder"]["embed"]["kernel"]
    np.testing.assert_array_equal(ours, frozen)
    trained = mim_jax.load_encoder(mocov3)
    assert jax.tree.structure(trained.params) == jax.tree.structure(encoder.params)
    change = trained.features(IMAGES) - encoder.features(IMAGES)
    assert np.abs(change).max() > 1e-2


def test_what_cannot_be_loaded_is_named(mae, tmp_path):
    with pytest.raises(configs.ConfigError, match="nowhere': no config.json there"):
        mim_jax.load_encoder(tmp_path / "nowhere")
    with pytest.raises(configs.ConfigError, match="no checkpoint 3 under .*there: 10"):
        mim_jax.load_encoder(mae, step=3)
    with pytest.raises(configs.ConfigError, match="no checkpoint 3 under"):
        mim_jax.load_encoder(mae, step=3, weights="initial")
    with pytest.raises(configs.ConfigError, match="weights='teacher': .* has none"):
        mim_jax.load_encoder(mae, weights="teacher")
    known = "weights='best' is unknown; known: trained, teacher, initial"
    with pytest.raises(configs.ConfigError, match=known):
        mim_jax.load_encoder(mae, weights="best")
    other = tmp_path / "other"
    other.mkdir()
    text = configs.dumps(configs.experiment("eval"))
    (other / "config.json").write_text(text)
    with pytest.raises(configs.ConfigError, match="job 'eval'; want a training run"):
        mim_jax.load_encoder(other)
    damaged = run_in(tmp_path, "mae")
    (damaged / "checkpoints" / "10" / "about" / "metadata").write_text("{}")
    with pytest.raises(CheckpointError, match="checkpoint 10 .* is damaged"):
        mim_jax.load_encoder(damaged)


def test_a_saved_config_is_read_without_its_data(mae):
    assert read_config(mae, "run").objective.name == "mae"


def test_importing_the_package_imports_nothing_heavy():
    program = """
import sys
before = set(sys.modules)
import mim_jax
heavy = {"jax", "numpy", "flax", "mim_jax.run"} & (set(sys.modules) - before)
assert not heavy and "load_encoder" in dir(mim_jax) and mim_jax.__version__, heavy
try:
    mim_jax.load_decoder
except AttributeError as error:
    assert "'mim_jax' has no attribute 'load_decoder'" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
