# SPDX-License-Identifier: Apache-2.0
"""The eval job reads a run as it was trained: same numbers as the run's own report."""

import hashlib
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from mim_jax import config, evaluate, train
from mim_jax.state import unstack_blocks

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    tree = config.read(str(ROOT / "configs" / "mae.py:photos"))
    tree.steps, tree.batch_size, tree.seed, tree.scan = 3, 8, 5, True
    tree.objective.encoder.update(dict(width=16, depth=2, heads=2))
    tree.objective.decoder.update(dict(width=16, depth=1, heads=2))
    tree.report.update(dict(images=2, draws=1, inpainted=0, rows=1))
    tree.compile_cache = False
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    # Strict promotion is for our own code; here a whole program runs, optax included.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        train.run(tree, workdir)
    return workdir


def _evaluation(run, **values):
    tree = config.read(str(ROOT / "configs" / "reconstruction.py"))
    tree.run = str(run)
    tree.eval.update(dict(images=2, draws=1, inpainted=0, rows=1))
    tree.update(values)
    return tree


def test_a_checkpoint_gives_the_numbers_of_the_runs_own_report(trained, tmp_path):
    evaluate.run(_evaluation(trained), tmp_path / "out")
    name = "report/reconstruction.json"
    ours = json.loads((tmp_path / "out" / name).read_text())
    theirs = json.loads((trained / name).read_text())
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, abs=1e-4), key
    assert ours["psnr_model_db"] != ours["psnr_untrained_db"]
    per_image = trained / "report" / "reconstruction.npz"
    with np.load(per_image, allow_pickle=False) as arrays:
        mean = arrays["psnr_model_db"].mean()
    assert mean == pytest.approx(theirs["psnr_model_db"], abs=1e-6)


def test_runs_side_by_side_and_what_is_written_of_them(trained, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    tree = _evaluation(trained, also=(str(other),))
    evaluate.run(tree, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["eval"] == "reconstruction" and found["config"]["run"] == str(trained)
    one, two = (found["runs"][f"{name}, step 3"] for name in ("tiny", "other"))
    assert one["results"] == two["results"] and one["run"] != two["run"]
    number = one["results"]["psnr_model_db"]
    # Two images and one mask: Student's t with one degree of freedom, 12.706.
    per_image = json.loads((trained / "report" / "reconstruction.json").read_text())
    assert number["value"] == pytest.approx(per_image["psnr_model_db"], abs=1e-4)
    assert number["unit"] == "dB" and number["n"] == 2
    low, high = number["interval"]
    assert (low + high) / 2 == pytest.approx(number["value"])
    with np.load(tmp_path / "out" / "report" / "reconstruction.npz") as arrays:
        for title in found["runs"]:
            assert arrays[f"{title}/psnr_model_db"].shape == (2,)
    run, _ = evaluate.load(trained)
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(unstack_blocks(run.params)):
        name = "/".join(str(part.key) for part in path)
        digest.update(f"{name} {leaf.dtype} {leaf.shape} ".encode())
        digest.update(np.asarray(leaf).tobytes())
    assert one["parameters_sha256"] == two["parameters_sha256"] == digest.hexdigest()
    with pytest.raises(config.ConfigError, match="is called 'tiny, step 3' like"):
        evaluate.run(_evaluation(trained, also=(str(trained),)), tmp_path / "again")


def test_the_random_baseline_is_the_model_before_training(trained, tmp_path):
    evaluate.run(_evaluation(trained, weights="initial"), tmp_path / "out")
    found = json.loads((tmp_path / "out" / "report/reconstruction.json").read_text())
    assert found["psnr_model_db"] == found["psnr_untrained_db"]
    runs = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert runs.keys() == {"tiny, random, step 0"}


def test_an_evaluation_does_not_overwrite_its_run(trained):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    with pytest.raises(config.ConfigError, match="holds a training run, and this job"):
        evaluate.run(_evaluation(trained), trained)
    after = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    assert after == before


def test_what_only_the_data_can_tell_is_one_line(trained, tmp_path):
    tree = config.read(str(ROOT / "configs" / "tsne.py"))
    tree.run = str(trained)
    with pytest.raises(config.ConfigError, match="config.eval: classes=10: the source"):
        evaluate.run(tree, tmp_path / "out")


def test_a_run_is_what_its_own_config_says(trained):
    run, settings = evaluate.load(trained)
    assert run.step == 3 and run.name == "tiny" and settings.seed == 5
    assert settings.objective.encoder.width == 16
    assert run.memory is None  # its masking has none
    # The blocks stacked, as they were trained.
    assert jax.tree.leaves(run.params["encoder"]["blocks"])[0].shape[0] == 2
    # The first update has learning rate 0; the next ones move every kernel.
    moved = jax.tree.map(
        lambda a, b: float(np.abs(a - b).max()), run.params, run.initial
    )
    assert all(change > 0 for change in jax.tree.leaves(moved["encoder"]["blocks"]))


def test_a_run_that_is_not_there_is_named(trained, tmp_path):
    with pytest.raises(config.ConfigError, match="no config.json there"):
        evaluate.run(_evaluation(tmp_path / "nowhere"), tmp_path / "out")
    with pytest.raises(config.ConfigError, match="no checkpoint 2 under .*there: 3"):
        evaluate.run(_evaluation(trained, step=2), tmp_path / "out")
    assert not (tmp_path / "out").exists()
