# SPDX-License-Identifier: Apache-2.0
"""Weights as one file and back: the same bits, the same features, clear refusals."""

import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

import mim_jax
from mim_jax import config as configs
from mim_jax import sharding, train, weights
from mim_jax.run import rundir
from mim_jax.run.checkpoint import MismatchError
from mim_jax.run.parts import read_parts

OLD = pathlib.Path(__file__).parent / "fixtures" / "old_runs"
PARTS = ("params", "teacher", "stats")


@pytest.fixture(params=["mae", "mocov3"])
def run(request, tmp_path) -> pathlib.Path:
    return shutil.copytree(OLD / request.param / "run", tmp_path / "run")


@pytest.fixture
def file(run, tmp_path, capfd) -> pathlib.Path:
    path = tmp_path / "kept" / "weights.safetensors"
    assert weights.main(["export", str(run), str(path)]) == 0
    assert " M parameters, written by mim_jax " in capfd.readouterr().out
    return path


def flat(run: pathlib.Path) -> dict[str, np.ndarray]:
    _, found = read_parts(run, parts=PARTS)
    return traverse_util.flatten_dict(jax.device_get(found), sep="/")


def test_the_file_has_the_bits_of_the_checkpoint(run, file):
    want, found = flat(run), load_file(file)
    assert found.keys() == want.keys() and len(want) > 10
    for name, leaf in want.items():
        assert found[name].tobytes() == leaf.tobytes(), name
        assert (found[name].dtype, found[name].shape) == (leaf.dtype, leaf.shape)


def test_a_run_directory_is_made_that_is_read_as_the_old_one(run, file, tmp_path):
    again = tmp_path / "again"
    assert weights.main(["import", str(file), str(again)]) == 0
    want, found = flat(run), flat(again)
    assert found.keys() == want.keys()
    assert all(found[name].tobytes() == leaf.tobytes() for name, leaf in want.items())
    assert configs.load(again / "config.json") == configs.load(run / "config.json")
    assert read_parts(again)[0] == read_parts(run)[0]
    line, *rest = (again / "summary.txt").read_text().splitlines()
    assert line == f"command     python -m mim_jax.weights import {file} {again}"
    assert f"weights     of {file}, step {read_parts(run)[0]}" in rest
    one, other = mim_jax.load_encoder(run), mim_jax.load_encoder(again)
    side = (*one.image_size, one.channels)
    images = np.random.default_rng(0).integers(0, 256, (3, *side), np.uint8)
    np.testing.assert_array_equal(one.features(images), other.features(images))


def test_training_cannot_go_on_without_an_optimiser(file, tmp_path, monkeypatch):
    again = tmp_path / "again"
    weights.main(["import", str(file), str(again)])
    before = sorted(path.name for path in (again / "checkpoints").iterdir())
    tree = configs.load(again / "config.json")
    tree.compile_cache = False
    build = sharding.Mesh.build
    monkeypatch.setattr(
        sharding.Mesh, "build", lambda mesh, _=None: build(mesh, jax.devices()[:1])
    )
    with pytest.raises(MismatchError, match="imported from weights.safetensors, witho"):
        train.run(tree, again)
    assert sorted(path.name for path in (again / "checkpoints").iterdir()) == before


def test_the_file_says_what_it_holds(run, file, capfd):
    assert weights.main(["inspect", str(file)]) == 0
    first, *lines = capfd.readouterr().out.splitlines()
    name = json.loads((run / "config.json").read_text())["objective"]["name"]
    assert first.startswith(f"{file}: {name}, step {read_parts(run)[0]}, ")
    found = {line.split()[0]: line.split(None, 2)[1:] for line in lines}
    assert found == {name: ["F32", str([*x.shape])] for name, x in flat(run).items()}


def test_nothing_is_overwritten(run, file, capfd):
    config = (run / "config.json").read_bytes()
    assert weights.main(["import", str(file), str(run)]) == 2
    assert "holds a run already: want another directory" in capfd.readouterr().err
    assert (run / "config.json").read_bytes() == config


@pytest.mark.parametrize(
    "content, expected",
    [
        (None, " cannot be read: "),
        (b"no weights", " is no whole safetensors file: "),
        ({"format": "mim_jax weights 1"}, ": its metadata are damaged (KeyError: "),
        (
            {"format": "mim_jax weights 2"},
            " has the format 'mim_jax weights 2': want '",
        ),
        (
            {"format": "pt"},
            " is no vision transformer that is known: it has 1 arrays, ",
        ),
    ],
)
def test_a_file_that_is_none_of_ours(tmp_path, capfd, content, expected):
    path = tmp_path / "x.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        save_file({"a": np.zeros(2, np.float32)}, path, content)
    for command in (["inspect", str(path)], ["import", str(path), str(tmp_path / "r")]):
        assert weights.main(command) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(f"error: {path}{expected}")
    assert not (tmp_path / "r").exists()


CONFIG = {"job": "train", "objective": {"name": "mae"}}
NAMES = {
    "outside": {"../../x": 1},
    "unknown": {"opt_state/x": 1},
    "empty part": {"params/": 1},
    "leaf and folder": {"params/a": 1, "params/a/b": 1},
    "escape sequence": {"params/\x1b[2J": 1},
}


def hostile(path, names=("params/a",), step="3", config=CONFIG, version="0.1"):
    about = {"format": "mim_jax weights 1", "version": version, "step": step}
    about["config"] = config if isinstance(config, str) else json.dumps(config)
    save_file({name: np.zeros(2, np.float32) for name in names}, path, about)


@pytest.mark.parametrize(
    "given",
    [
        *(dict(names=tuple(names)) for names in NAMES.values()),
        dict(step="-1"),
        dict(step="1" * 30),
        dict(step=str(2**31)),
        dict(step="1.5"),
        dict(config={"job": "study", "objective": {"name": "mae"}}),
        dict(config={"job": "train", "objective": "mae"}),
        dict(config={"job": "train", "objective": {"name": ["mae"]}}),
        dict(config={"job": "train", "objective": {"name": "\x1b[2J"}}),
        dict(config=[1]),
        dict(config="[" * 100_000),
        dict(version="\x1b[2J"),
    ],
    ids=lambda given: repr(given)[:40],
)
def test_a_file_of_somebody_elses_making_is_refused(tmp_path, capfd, given):
    path, run = tmp_path / "x.safetensors", tmp_path / "runs" / "r"
    hostile(path)
    assert weights.main(["inspect", str(path)]) == 0  # nothing is wrong yet
    hostile(path, **given)
    capfd.readouterr()
    for command in (["inspect", str(path)], ["import", str(path), str(run)]):
        assert weights.main(command) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(f"error: {path}: its metadata are damaged (")
        assert "\x1b" not in line
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_run_of_a_file_knows_its_config_without_the_file(file, tmp_path):
    again = tmp_path / "again"
    weights.main(["import", str(file), str(again)])
    want = configs.load(again / "config.json")
    (again / "config.json").unlink()
    assert rundir.read_config(again, "run") == want


# Orbax drops coroutines of writes that fail; who collects them is chance.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_told_by_its_exit_code(file, tmp_path, capfd):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, before[1]))
    try:
        assert weights.main(["import", str(file), str(tmp_path / "again")]) == 4
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "error: " in capfd.readouterr().err


def test_a_module_that_is_not_there_is_one_line(tmp_path, capfd):
    assert weights.main(["--plugins=nowhere", "inspect", str(tmp_path / "x")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: --plugins=nowhere: there is no module 'nowhere'")


def test_what_cannot_be_exported(tmp_path, capfd):
    run, file = str(tmp_path / "none"), str(tmp_path / "x.safetensors")
    assert weights.main(["export", run, file]) == 2
    assert "no config.json there" in capfd.readouterr().err
    run = str(shutil.copytree(OLD / "mae" / "run", tmp_path / "run"))
    assert weights.main(["export", run, str(tmp_path / "x.npz")]) == 2
    assert "want a name that ends in .safetensors" in capfd.readouterr().err
    assert weights.main(["export", run, file, "--step=99999"]) == 2
    assert "no checkpoint 99999" in capfd.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()


KEPT = sorted((OLD.parents[2] / "notebooks" / "weights").glob("*.safetensors"))


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_a_kept_file_is_small_and_gives_features(path, tmp_path):
    assert path.stat().st_size < 4 * 2**20
    assert weights.main(["import", str(path), str(tmp_path / "run")]) == 0
    encoder = mim_jax.load_encoder(tmp_path / "run")
    assert encoder.step >= 200 and encoder.image_size == (28, 28)
    images = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 1), np.uint8)
    features = encoder.features(images)
    assert features.shape == (2, encoder.width) and np.isfinite(features).all()


def test_a_list_that_nobody_reads_is_no_error(file):
    command = f"{sys.executable} -m mim_jax.weights inspect {file} | true"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and done.stderr == ""
