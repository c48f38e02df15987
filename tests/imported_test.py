# SPDX-License-Identifier: Apache-2.0
"""A run of imported weights goes where other runs go; and the same without a run."""

import json
import pathlib

import jax
import numpy as np
import pytest
from foreign_models import FOLDER, VISIBLE, images, order
from PIL import Image
from small_evals import SMALL

import mim_jax
from mim_jax import compare, config, evaluate, train, weights
from mim_jax.evals import EVALS
from mim_jax.run import loading
from mim_jax.run.checkpoint import MismatchError
from mim_jax.run.parts import read_parts
from mim_jax.sharding import Mesh
from mim_jax.studies import STUDIES, grid, job, runs, work

ROOT = pathlib.Path(__file__).parents[1]
SAID = ["--heads=2", "--decoder-heads=3"]


def pictures(folder: pathlib.Path, seed: int, channels: int = 3) -> pathlib.Path:
    """Class folders of 10 training and 6 held-out pictures of three classes."""
    random = np.random.default_rng(seed)
    for split, count in (("train", 10), ("val", 6)):
        for label in range(3):
            place = folder / split / "abc"[label]
            place.mkdir(parents=True)
            for i in range(count):
                shape = (16, 16, 3) if channels == 3 else (16, 16)
                pixels = random.integers(0, 80, shape) + 80 * label
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> pathlib.Path:
    """A folder with pictures and runs: `mae` knows where they are, `dino` does not."""
    home = tmp_path_factory.mktemp("home")
    pictures(home / "pictures", 0)
    there = ["--source=folder", f"--path={home / 'pictures'}"]
    for name, file, more in (
        ("mae", "mae.pth", there),
        ("dino", "dino.pth", []),
        ("beit", "hf_beit", there),
    ):
        command = ["import", str(FOLDER / file), str(home / name), *SAID, *more]
        assert weights.main(command) == 0
        path = home / name / "config.json"
        saved = json.loads(path.read_text())
        saved["data"] |= dict(workers=0, threads=1, eval_crop_fraction=1.0)
        path.write_text(json.dumps(saved))
    return home


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    build = Mesh.build
    one_device = lambda mesh, _=None: build(mesh, jax.devices()[:1])  # noqa: E731
    monkeypatch.setattr(Mesh, "build", one_device)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


USUAL = {
    "mae": ("knn", "linear", "cka", "attention", "reconstruction"),
    "beit": ("cka", "attention"),  # which hide patches, and look at attention
}


@pytest.mark.parametrize("name", USUAL)
def test_usual_evaluations_measure_it(name, home):
    run, training = loading.load(home / name)
    one = loading.Loaded(home / name, run, training)
    for kind in USUAL[name]:
        evaluation = EVALS[kind](**SMALL[kind])
        loading.check(evaluation, one)
        reports, reasons = loading.measure(evaluation, {"run": one})
        assert not reasons, (kind, reasons)
        assert all(np.isfinite(n.value) for n in reports["run"].numbers.values()), kind


def evaluation(home: pathlib.Path, run: str, source: str = "") -> config.Tree:
    tree = config.read(f"configs/knn.py{':source=' * bool(source)}{source}")
    tree.run = str(home / run)
    tree.eval.update(SMALL["knn"])
    return tree


def test_an_evaluation_names_images_that_the_run_does_not(home, tmp_path, capsys):
    pictures(tmp_path / "others", 1)
    tree = evaluation(home, "dino", "folder")
    tree.data.source.path = str(tmp_path / "others")
    evaluate.run(tree, tmp_path / "out")
    assert (
        "dino: images of config.data.source; from the run: size 16 x 16, crop of 1.0, "
        "mean and deviation\n"
    ) in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["config"]["data"]["source"]["path"] == str(tmp_path / "others")
    (one,) = found["runs"].values()
    assert one["results"]["images"]["value"] == 18
    # The numbers are of those images: the classes are three brightnesses.
    assert one["results"]["accuracy_model_k3"]["n"] == 18


def test_without_them_the_runs_own_images_are_wanted(home, tmp_path):
    with pytest.raises(config.ConfigError, match="'imagenet2012' is not prepared"):
        evaluate.run(evaluation(home, "dino"), tmp_path / "out")


def test_images_of_other_channels_are_refused(home, tmp_path):
    tree = evaluation(home, "dino", "digits")
    with pytest.raises(config.ConfigError) as caught:
        evaluate.run(tree, tmp_path / "out")
    assert str(caught.value) == (
        f"config.data.source has images of 1 channel(s), and {home / 'dino'} learned "
        "from those of 3: want the same, by a leaf data.source.channels where the "
        "source has one"
    )


def test_a_leaf_of_a_source_that_is_not_chosen_says_how_to_choose_it():
    with pytest.raises(config.ConfigError) as caught:
        config.check_path(config.read("configs/knn.py"), "data.source.path")
    assert str(caught.value) == (
        "config.data.source is None: choose the source in the config file or by its "
        "variant, --config=configs/FILE.py:source=NAME"
    )


def test_a_comparison_reads_other_images_too(home, tmp_path):
    pictures(tmp_path / "others", 2)
    tree = config.read("configs/compare.py:source=folder")
    tree.runs = (str(home / "mae"), str(home / "dino"))
    tree.data.source.path = str(tmp_path / "others")
    tree.skip = ("cka", "tsne", "reconstruction", "knn")
    tree.attention.update(SMALL["attention"])
    compare.run(tree, tmp_path / "out")
    page = (tmp_path / "out" / "report" / "index.html").read_text()
    assert "mae, step 0" in page and "EncoderOnly" in page
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["attention"]) == 3  # and the first one before training


@pytest.mark.parametrize("name", [pytest.param("mae", marks=pytest.mark.slow), "beit"])
def test_fine_tuning_begins_with_it(name, home, tmp_path, capsys):
    tree = config.read("configs/finetune.py:source=folder")
    tree.init_from.run = str(home / name)
    tree.data.source.path = str(home / "pictures")
    tree.data.update(dict(image_size=(16, 16), workers=0, threads=1))
    tree.objective.classes, tree.batch_size, tree.steps = 3, 8, 1
    tree.objective.mix.update(dict(mixup=0.0, cutmix=0.0))
    tree.log.update(dict(tensorboard=False, progress="none"))
    tree.report.mistakes, tree.compile_cache, tree.dtype = 0, False, "float32"
    train.run(tree, tmp_path / "run")
    said = capsys.readouterr().out
    assert "parameters taken; new: head/linear (2)" in said
    assert "; in both, but made anew: encoder/norm (2)" in said
    saved = config.load(tmp_path / "run" / "config.json").objective.encoder
    assert saved.relative_positions == (name == "beit") and saved.heads == 2
    if name == "beit":
        assert (saved.positions, saved.layer_scale) == ("none", 0.1)
        assert "encoder/relative_positions" not in said.partition("not taken")[2]


def test_it_is_not_trained_on(home, tmp_path):
    for name, error, why in (
        ("mae", MismatchError, "were imported from mae.pth, without an optimiser's"),
        ("beit", config.ConfigError, "objective 'encoder' has no loss"),
    ):
        tree = config.load(home / name / "config.json")
        tree.compile_cache = False
        tree.log.update(dict(tensorboard=False, progress="none"))
        before = sorted(path.name for path in (home / name).iterdir())
        with pytest.raises(error, match=why):
            train.run(tree, home / name)
        assert {"config.json", "checkpoints"} <= set(before)


def test_a_row_of_a_study_is_measured_on_it(home, tmp_path, monkeypatch):
    neighbours = grid.Measure(name="tiny_knn", eval="knn", settings=SMALL["knn"])
    column = grid.Column(
        title="3-NN, %", run="pretrain", measure=neighbours, keys=("accuracy_model_k3",)
    )
    study = grid.Study(
        name="given",
        title="Given weights",
        paper="2208.04164",
        small="digits",
        columns=(column,),
        rows=(
            grid.Row(name="MAE", runs={"pretrain": runs.MAE}),
            grid.Row(name="CAE", missing="it is not part of this program"),
        ),
    )
    monkeypatch.setitem(STUDIES, "given", study)
    tree = config.read("configs/study.py:digits")
    tree.study, tree.seeds = "given", (0, 1)
    tree.results, tree.runs = str(tmp_path), str(tmp_path / "runs")
    tree.given = (f"CAE={home / 'mae'}",)
    settings = config.build(tree)
    told = grid.with_given(study, {"CAE": str(home / "mae")})
    found = job.Cells([told], settings, tmp_path / "runs")
    (cell,) = {cell.key: cell for cell in found.of_study(told) if cell.given}.values()
    tree.only = cell.name
    monkeypatch.setattr(work.programs, "keep", lambda: None)
    job.run(tree, tmp_path / "work")
    tree.only, tree.cells = "", 0
    job.run(tree, tmp_path / "work")
    page = (tmp_path / "given" / "README.md").read_text()
    (row,) = (line for line in page.splitlines() if line.startswith("| CAE |"))
    saved = json.loads((tmp_path / "cells" / f"{cell.name}.json").read_text())
    number = saved["measured"]["tiny_knn"]["numbers"]["accuracy_model_k3"]["value"]
    # One run, which both seeds share, is one value.
    assert f"{100 * number:.1f}, n = 1" in row
    assert "CAE: measured on weights that were given: mae." in page
    assert not (tmp_path / "runs" / cell.name).exists()
    for wrong, why in (("CEA=x", "did you mean 'CAE'"), ("CAE", "want ROW=RUNDIR")):
        tree.given = (wrong,)
        with pytest.raises(config.ConfigError, match=why):
            job.run(tree, tmp_path / "work")


def test_a_run_goes_out_and_comes_back_by_its_commands(home, tmp_path, capsys):
    folder, again = tmp_path / "hf", tmp_path / "again"
    assert weights.main(["export", str(home / "mae"), str(folder), "--format=hf"]) == 0
    assert (
        "transformers.ViTMAEForPreTraining.from_pretrained" in capsys.readouterr().out
    )
    assert weights.main(["import", str(folder), str(again)]) == 0
    (_, one), (_, other) = read_parts(home / "mae"), read_parts(again)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)
    capsys.readouterr()
    assert weights.main(["inspect", str(folder)]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{folder}: MAE of transformers, 0.01 M parameters")
    assert (
        "  network: 2 blocks, 16 wide, 2 heads, patches of 4, images of 16 x 16"
        in lines
    )
    assert any(line.startswith("vit.layernorm.bias ") for line in lines)


# Without a run.


def test_two_lines_load_weights_of_another_program(home):
    model = mim_jax.load(FOLDER / "hf_mae")
    again = mim_jax.load(home / "mae")  # FAIR's file of the same network
    assert model.image_size == (16, 16) and model.channels == 3
    pixels = images()
    want = np.load(FOLDER / "hf_mae.npz")
    np.testing.assert_array_equal(model.features(pixels), again.features(pixels))
    filled = model.reconstruct(pixels, ratio=0.75, seed=3)
    assert filled.images.shape == pixels.shape and filled.hidden.shape == (3, 4, 4)
    assert (filled.hidden.sum(axis=(1, 2)) == 16 - VISIBLE).all()
    hidden = filled.hidden.repeat(4, axis=1).repeat(4, axis=2)
    np.testing.assert_allclose(filled.images[~hidden], pixels[~hidden], atol=1e-6)
    assert np.abs(filled.images - pixels)[hidden].mean() > 0.01
    assert 0 <= filled.images.min() and filled.images.max() <= 1
    other = model.reconstruct(pixels[:2], seed=3)
    np.testing.assert_array_equal(other.hidden, filled.hidden[:2])
    assert (model.reconstruct(pixels, seed=4).hidden != filled.hidden).any()
    looks = model.attention(pixels)
    assert looks.shape == (3, 2, 4, 4) and looks.min() > 0
    assert looks.sum(axis=(2, 3)).max() < 1
    first = model.attention(pixels, block=0)
    assert np.abs(first - looks).max() > 1e-4
    np.testing.assert_array_equal(first, model.attention(pixels, block=-2))
    with pytest.raises(IndexError, match="block=2: want one of -2 to 1"):
        model.attention(pixels, block=2)
    assert order().shape == (3, 16) and want["loss"] > 0


def test_a_model_without_a_decoder_fills_in_nothing():
    model = mim_jax.load(FOLDER / "mae_encoder.pth", heads=2)
    assert model.features(images()).shape == (3, 16)
    with pytest.raises(ValueError, match="EncoderOnly predicts no pixels"):
        model.reconstruct(images())
    with pytest.raises(config.ConfigError, match="has one set of weights; want None"):
        mim_jax.load(FOLDER / "mae_encoder.pth", step=3, heads=2)
    with pytest.raises(config.ConfigError, match="weights='teacher': .* has none"):
        mim_jax.load(FOLDER / "mae_encoder.pth", weights="teacher", heads=2)
    random = mim_jax.load(FOLDER / "mae_encoder.pth", weights="initial", heads=2)
    assert np.abs(random.features(images()) - model.features(images())).max() > 0.1


def test_a_file_is_loaded_with_the_heads_that_are_said(home):
    run, file = mim_jax.load(home / "mae"), FOLDER / "mae.pth"
    same = mim_jax.load(file, heads=2, decoder_heads=3)
    other = mim_jax.load(file, heads=2, decoder_heads=1)
    want, found, apart = (m.reconstruct(images()) for m in (run, same, other))
    np.testing.assert_array_equal(want.images, found.images)
    assert np.abs(want.images - apart.images).max() > 1e-3


def test_a_file_of_ours_is_loaded_as_the_run_that_it_is_of(tmp_path):
    run = ROOT / "tests" / "fixtures" / "old_runs" / "mocov3" / "run"
    file = tmp_path / "x.safetensors"
    assert weights.main(["export", str(run), str(file)]) == 0
    for which in ("trained", "teacher"):
        one, other = (mim_jax.load(path, weights=which) for path in (run, file))
        assert jax.tree.structure(one.params) == jax.tree.structure(other.params)
        jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
        assert one.objective == other.objective and one.step == other.step == 10


def test_public_names_are_in_one_place():
    assert set(mim_jax.__all__) == {"Pretrained", "__version__", "load", "load_encoder"}
    assert all(hasattr(mim_jax, name) for name in mim_jax.__all__)
    assert set(mim_jax.__all__) <= set(dir(mim_jax))
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        mim_jax.lod  # noqa: B018
