# SPDX-License-Identifier: Apache-2.0
"""The config files that the package ships, by name and from any folder; the wheel."""

import json
import os
import pathlib
import subprocess
import sys

import environments
import pytest
from absl.testing import flagsaver

from mim_jax import __version__, config, main
from mim_jax.run import commandline, shipped

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["mae", "mae.py", "configs/mae", "configs/mae.py"])
def test_a_shipped_file_is_found_by_its_name_from_any_folder(
    tmp_path, monkeypatch, name
):
    monkeypatch.chdir(tmp_path)
    assert shipped.find(name) == ROOT / "configs" / "mae.py"
    assert config.read(f"{name}:mnist").data.source.name == "mnist"


def test_a_file_of_ones_own_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "configs" / "mae.py"
    own.parent.mkdir()
    own.write_text("def get_config(variant='none'):\n    return variant\n")
    assert config.read("configs/mae.py:mine") == "mine"
    # A bare name is that of the shipped file, whatever lies here.
    (tmp_path / "mae").write_text("no config")
    assert config.read("mae").job == "train"


@pytest.mark.parametrize("name", ["mea", "other/mae.py", "mae.txt", "configs/x/mae.py"])
def test_what_is_not_there_is_told_with_where_it_was_looked_for(
    tmp_path, monkeypatch, name
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(config.ConfigError) as caught:
        shipped.find(name)
    said = str(caught.value)
    assert said.startswith(f"config file {name!r} is unknown (did you mean 'mae'?)")
    assert str((tmp_path / name).parent) in said and str(ROOT / "configs") in said


@pytest.mark.parametrize(
    "words",
    [["--config=mae:mnist,masking=grid"], ["-config", "mae:mnist,masking=grid"]],
)
def test_the_command_line_takes_a_name(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    argv = ["main", "--workdir=run", *words, "--config.steps=7"]
    monkeypatch.setattr(sys, "argv", argv)  # ml_collections looks there for leaves
    with flagsaver.flagsaver():
        assert main.parse(argv) == ["main"]
        tree = main.CONFIG.value
        assert (tree.steps, tree.data.source.name) == (7, "mnist")
        assert tree.objective.masking.name == "grid"


def said(capsys, *words) -> str:
    with pytest.raises(SystemExit) as caught:
        main.parse(["main", *words])
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_help_lists_files_variants_and_plug_ins(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = said(capsys, "--help")
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    files = [path.stem for path in (ROOT / "configs").glob("*.py")]
    assert len(files) > 30 and set(files) <= lines.keys()
    for name, variant in (("mae", ":photos"), ("cmae", ":cifar10"), ("dino", ":mnist")):
        assert variant in lines[name].split()
    for word, table in config.KINDS.values():
        assert all(name in lines[word] for name in table), word
    assert "--workdir" in lines and "--config" in lines
    # The example is a command that works.
    (example,) = (line for line in text.splitlines() if "mim_jax.main --config" in line)
    with flagsaver.flagsaver():
        main.parse(example.split()[2:])
        assert main.CONFIG.value.data.source.name == "mnist"


def test_the_version(capsys):
    assert said(capsys, "--version").startswith(f"mim_jax {__version__}, jax ")


def test_no_argument_shows_an_example(monkeypatch, capfd):
    class Left(Exception):
        pass

    def leave(code):
        raise Left(code)

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Left, match="2"):
        main.parse(["main"])
    error = capfd.readouterr().err
    assert error.startswith("error: no --config") and commandline._EXAMPLE in error


@pytest.mark.slow
@pytest.mark.every_change
def test_the_wheel_alone_runs_a_job_and_an_evaluation(tmp_path):
    """In an empty folder, by the installed command and by the module."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels, site, here = tmp_path / "wheels", tmp_path / "site", tmp_path / "empty"
    here.mkdir()
    subprocess.run([*pip, "wheel", "--no-deps", "-w", wheels, ROOT], check=True)
    (wheel,) = wheels.iterdir()
    install = [*pip, "install", "--no-deps", "--target", site, wheel]
    subprocess.run(install, check=True)
    assert {path.name for path in site.iterdir()} >= {"mim_jax", "bin"}
    assert not (site / "configs").exists()
    environment = environments.small(PYTHONPATH=str(site))

    def run(*words):
        done = subprocess.run(
            [sys.executable, "-P", *words],
            cwd=here,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    small = ["--config.steps=2", "--config.batch_size=8", "--config.also=()"]
    command = str(site / "bin" / "mim-jax")
    out = run(command, "--config=mae:digits", *small, "--workdir=run")
    assert "learned     hidden pixels at " in out
    run("-m", "mim_jax", "--config=knn", "--config.run=run", "--workdir=knn")
    found = json.loads((here / "knn" / "report" / "knn.json").read_text())
    assert found["images"] == 355
    program = (
        "import mim_jax, numpy as np\n"
        "digits = np.zeros((2, 8, 8, 1), np.uint8)\n"
        "print(mim_jax.__file__, mim_jax.load_encoder('run').features(digits).shape)\n"
    )
    last = run("-c", program).splitlines()[-1]
    assert last == f"{site / 'mim_jax' / '__init__.py'} (2, 64)"


def test_the_version_to_cite_is_that_of_the_package():
    lines = (ROOT / "CITATION.cff").read_text().splitlines()
    assert f"version: {__version__}" in lines
