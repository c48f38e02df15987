# SPDX-License-Identifier: Apache-2.0
"""Job "study" as a real process: killed, resumed, with a cell that fails."""

import contextlib
import copy
import dataclasses
import io
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import environments
import jax
import numpy as np
import pytest
import tiny_study

from mim_jax import config
from mim_jax.run import loading
from mim_jax.studies import STUDIES, cells, job, work
from mim_jax.studies.grid import Measure

ROOT = pathlib.Path(__file__).parents[1]
ENVIRONMENT = environments.small(
    PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}",
    # So that small programs are compiled once in all of these processes.
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
)


# It registered itself at import, as a plug-in does; other files must not meet it.
del STUDIES[tiny_study.STUDY.name]


@pytest.fixture(autouse=True, scope="module")
def registered():
    STUDIES[tiny_study.STUDY.name] = tiny_study.STUDY
    yield
    del STUDIES[tiny_study.STUDY.name]


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def tree_of(home: pathlib.Path, **leaves) -> config.Tree:
    tree = config.read("configs/study.py:digits")
    tree.study, tree.seeds, tree.plugins = "tiny", (0,), ("tiny_study",)
    tree.results = str(home / "results")
    for leaf, value in leaves.items():
        tree[leaf] = value
    return tree


def arguments(home: pathlib.Path, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "mim_jax.main", "--plugins=tiny_study"),
        *("--config=configs/study.py:digits", "--config.study=tiny"),
        *("--config.seeds=(0,)", f"--config.results={home / 'results'}"),
        *(*more, f"--workdir={home / 'work' / 'tiny'}"),
    ]


def run(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )


def named(home: pathlib.Path, start: str) -> dict:
    """The file of the one cell whose name starts so."""
    (path,) = (home / "results" / "cells").glob(f"{start}-s0-*.json")
    return json.loads(path.read_text())


def printed(capsys, home: pathlib.Path, **leaves) -> list[str]:
    job.run(tree_of(home, **leaves), home / "work" / "tiny")
    return capsys.readouterr().out.splitlines()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The two cells that can be made, by the command that the study prints for the
    second, which makes the first as well; nothing is interrupted."""
    home = tmp_path_factory.mktemp("straight")
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.chdir(ROOT)
        job.run(tree_of(home, commands="local"), home / "work" / "tiny")
    lines = said.getvalue().splitlines()
    (line,) = (line for line in lines if "only=short-finetune" in line)
    words = shlex.split(line)
    assert words[:3] == ["python", "-m", "mim_jax.main"]
    done = run([sys.executable, *words[1:]])
    assert done.returncode == 0, done.stderr
    return home


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A study that is killed in its second cell, process and all, and started again."""
    home = tmp_path_factory.mktemp("resumed")
    with open(home / "out", "w") as out:
        study = subprocess.Popen(
            arguments(home), cwd=ROOT, env=ENVIRONMENT, stdout=out, stderr=out
        )
    runs, deadline = home / "work" / "runs", time.monotonic() + 300
    while not list(runs.glob("short-s0-*/checkpoints/1")):
        assert time.monotonic() < deadline and study.poll() is None
        time.sleep(0.01)
    (lock,) = runs.glob("locks/short-s0-*/lock")
    child = int(re.search(r"pid (\d+)", lock.read_text())[1])
    study.kill()
    os.kill(child, signal.SIGKILL)
    study.wait()
    assert not list((home / "results").glob("cells/short-s0-*"))
    done = run(arguments(home))
    return home, done


def test_a_printed_command_makes_its_cell_and_what_that_begins_with(straight):
    short, tuned = named(straight, "short"), named(straight, "short-finetune")
    assert tuned["parent"] == short["name"] and short["steps"] == tiny_study.STEPS
    assert 0 < short["measured"]["knn"]["numbers"]["accuracy_model_k10"]["value"] < 1
    assert "accuracy_held_out" in tuned["measured"]["accuracy"]["numbers"]
    assert not short["resumed"] and short["minutes"] > 0
    assert short["versions"]["jax"] and short["processor"]


@pytest.mark.slow
def test_a_study_that_was_killed_ends_with_the_same_numbers(straight, resumed):
    home, _ = resumed
    assert named(home, "short")["resumed"]
    for name in ("short", "short-finetune"):
        assert named(home, name)["measured"] == named(straight, name)["measured"]
        assert named(home, name)["key"] == named(straight, name)["key"]


def test_a_cell_that_fails_is_named_and_the_others_are_made(resumed):
    home, done = resumed
    assert done.returncode == 1
    assert "2 of 4 missing cells could not be made" in done.stderr
    assert re.search(r"broken-s0-\w+: step \d: loss nan .*\(exit code 3\)", done.stderr)
    assert re.search(
        r"broken-finetune-s0-\w+: it begins with broken-s0-\w+, which failed",
        done.stderr,
    )
    page = (home / "results" / "tiny" / "README.md").read_text()
    assert "2 of 4 cells finished" in page and str(home) not in page
    assert "broken, 10-NN, %: failed: step" in page
    assert "this version has no evaluation 'not_here'" in page


def test_finished_cells_need_no_run_directory(straight, tmp_path, capsys):
    shutil.copytree(straight / "results", tmp_path / "results")
    lines = printed(capsys, tmp_path, commands="local")
    assert not any("only=short" in line for line in lines)
    assert sum("only=broken" in line for line in lines) == 2
    # Nothing is left of the finished ones to make, so nothing starts.
    lines = printed(capsys, tmp_path, cells=0)
    assert lines[-1].startswith("2 of 4 cells finished")
    assert not list((tmp_path / "work" / "runs").glob("short*"))
    result = json.loads((tmp_path / "results" / "tiny" / "results.json").read_text())
    short = result["rows"][1]["numbers"]["10-NN, %"]
    found = named(straight, "short")["measured"]["knn"]["numbers"]
    assert short["mean"] == pytest.approx(100 * found["accuracy_model_k10"]["value"])
    assert (short["n"], short["paper"]) == (1, None)
    assert result["rows"][1]["numbers"]["fine-tuned, %"]["paper"] == 83.1


def test_commands_go_through_the_scripts_that_spread_them(tmp_path, capsys):
    for kind, script in (("slurm", "slurm.sh"), ("jobset", "gke_jobset.sh")):
        lines = printed(capsys, tmp_path, commands=kind)
        commands = [line for line in lines if not line.startswith("#")]
        names = set()
        for line in commands:
            name, path, dashes, *rest = shlex.split(line)
            assert (path, dashes) == (f"launch/{script}", "--")
            assert (ROOT / path).exists()
            names.add(name)
            assert rest[:2] == [
                "--plugins=tiny_study",
                "--config=configs/study.py:digits",
            ]
        assert len(commands) == len(names) == 4
    # The names of the jobs reach the scripts.
    done = subprocess.run(
        ["bash", "-c", f"{name} bash -c '. launch/env.sh; echo $NAME'"],
        cwd=ROOT,
        env=os.environ | {"LAUNCH": "launch"},
        capture_output=True,
        text=True,
    )
    assert f"NAME={done.stdout.strip()}" == name


def test_commands_for_the_compiler_name_training_configs(tmp_path, capsys):
    lines = printed(capsys, tmp_path, commands="aot", study="p2_grid")
    assert len(lines) > 5
    for line in lines:
        python, *rest = shlex.split(line)
        assert (python, rest[:2]) == ("python", ["-m", "mim_jax.aot"])
        tree = config.read(rest[2].removeprefix("--config="))
        assert tree.job == "train"
        for flag in rest[3:-1]:
            leaf = re.fullmatch(r"--config\.([\w.]+)=.*", flag)[1]
            config.check_path(tree, leaf)


def test_run_directories_that_nobody_needs_are_deleted(straight, tmp_path, capsys):
    """A finished run from which a cell of another study begins stays."""
    shutil.copytree(straight, tmp_path / "home")
    home = tmp_path / "home"
    runs = home / "work" / "runs"
    printed(capsys, home, cells=0, keep_runs=False)
    assert not list(runs.glob("short-*"))
    shutil.copytree(straight / "work" / "runs", runs, dirs_exist_ok=True)
    next((home / "results" / "cells").glob("short-finetune-*")).unlink()
    printed(capsys, home, cells=0, keep_runs=False)
    assert list(runs.glob("short-s0-*"))  # fine-tuning begins with it


def test_a_run_that_nothing_measures_is_a_finished_cell_too(straight, tmp_path):
    columns = tiny_study.STUDY.columns[1:2]  # of fine-tuned runs alone
    study = dataclasses.replace(tiny_study.STUDY, columns=columns, claims=())
    settings = config.build(tree_of(tmp_path))
    found = cells.Cells([study], settings, straight / "work" / "runs")
    cell, bench = (
        found.of(tiny_study.MAE, 0),
        work.Bench(found.runs, tmp_path, "digits"),
    )
    assert not cell.measures and job._lacks(bench, cell)
    work._finish(bench, cell)
    assert not job._lacks(bench, cell)
    made = cells.read(tmp_path, cell, "digits")
    assert made.measured == {} and made.file["steps"] == tiny_study.STEPS
    assert made.file["resumed"]  # the run had been trained by the study of `straight`


def test_an_untrained_row_is_measured_before_training(straight, monkeypatch):
    runs = straight / "work" / "runs"
    (folder,) = runs.glob("short-s0-*")
    run, training = loading.load(folder)
    seen = []

    def measure(evaluation, found):
        seen.append(found["run"])
        return {}, {"run": "not measured"}

    monkeypatch.setattr(work.loading, "measure", measure)
    trained = loading.Loaded(folder, run, training)
    for weights in ("trained", "initial"):
        asked = dataclasses.replace(tiny_study.NEIGHBOURS.measure, weights=weights)
        assert work._measured(asked, trained, "digits").missing == "not measured"
    of_run, untrained = (one.run.params for one in seen)
    for part in ("encoder", "decoder"):
        want = jax.tree.leaves(run.params[part])
        assert all(map(np.array_equal, jax.tree.leaves(of_run[part]), want))
        assert not all(map(np.array_equal, jax.tree.leaves(untrained[part]), want))


def test_what_has_no_data_yet_is_measured_once_they_are_there(
    straight, tmp_path, capsys
):
    shutil.copytree(straight, tmp_path / "home")
    home = tmp_path / "home"
    found = cells.Cells([], config.build(tree_of(home)), home / "work" / "runs")
    cell = found.of(tiny_study.TUNED, 0)
    bias = Measure(
        name="bias", eval="shape_bias", settings=dict(set="cue_conflict", examples=0)
    )
    filled = Measure(name="filled", eval="reconstruction")  # which no label run does
    cell.measures.update(bias=bias, filled=filled)
    bench = work.Bench(home / "work" / "runs", home / "results" / "cells", "digits")
    assert job._lacks(bench, cell)
    work._warn(bench, cell, ["bias", "filled"])
    said = capsys.readouterr().err
    assert said.count("WARNING") == 1 and "bias cannot be measured" in said
    work._finish(bench, cell)
    said = capsys.readouterr().err
    assert said.startswith(work.UNMEASURED) and "CUE_CONFLICT_DIR" in said
    finished = cells.read(bench.cells, cell, "digits")
    assert finished is not None and finished.lacks(cell) == ["bias"]
    assert (
        "want an objective that predicts pixels" in finished.measured["filled"].missing
    )
    bench.log(cell).parent.mkdir(exist_ok=True)
    bench.log(cell).write_text(f"{said}{said}measuring\n")
    assert job._warnings(bench.log(cell)) == said.splitlines()


def test_a_run_whose_parent_decided_its_network_is_trained(straight):
    """Its config says more than the declared one: here, whose tokens are pooled."""
    found = cells.Cells([], config.build(tree_of(straight)), straight / "work" / "runs")
    cell = found.of(tiny_study.TUNED, 0)
    assert work.is_trained(cell.folder, cell)
    declared = copy.deepcopy(cell.tree)
    declared.objective.encoder.width = 32  # the parent's is 16
    of_parent = dataclasses.replace(cell, recipe=declared)
    assert work.is_trained(cell.folder, of_parent)
    declared = copy.deepcopy(cell.tree)
    declared.optim.base_lr = 9e-9
    assert not work.is_trained(cell.folder, dataclasses.replace(cell, recipe=declared))


def test_numbers_are_not_left_on_machines_that_go_away(tmp_path, monkeypatch, capsys):
    full = dict(study="p1_table5", size="full", results="", commands="jobset")
    where = tmp_path / "work" / "x"
    with pytest.raises(config.ConfigError, match="results is empty: other machines"):
        job.run(tree_of(tmp_path, **full), where)
    tree = tree_of(tmp_path, **(full | {"results": "bucket/studies"}))
    folders = ("TFDS_DATA_DIR=gs://b/tfds", "COCO_DIR=/data/coco")
    monkeypatch.setenv("TFDS_DATA_DIR", "before")
    monkeypatch.setenv("COCO_DIR", "before")
    tree.data = folders
    job.run(tree, where)
    assert os.environ["TFDS_DATA_DIR"] == "gs://b/tfds"
    lines = [x for x in capsys.readouterr().out.splitlines() if "jobset" in x]
    for line in lines:
        words = shlex.split(line)
        assert "--config.results=bucket/studies" in words
        assert f"--config.data={folders!r}".replace(" ", "") in [
            word.replace(" ", "").replace(",)", ")") for word in words
        ]
    # Slurm's nodes share a disk.
    job.run(tree_of(tmp_path, **(full | {"commands": "slurm"})), where)
    slurm = [x for x in capsys.readouterr().out.splitlines() if "slurm.sh" in x]
    assert len(slurm) == len(lines) > 30
    want = f"--config.results={ROOT / 'docs' / 'studies'}"
    assert all(want in shlex.split(line) for line in slurm)

    only = shlex.split(slurm[0])[-2].partition("=")[2]
    plain = full | {"commands": "", "only": only}
    with pytest.raises(config.ConfigError, match="results is empty"):
        job.on_other_machines(tree_of(tmp_path, **plain), where)
    plain["results"] = "bucket/studies"
    cell = job.on_other_machines(tree_of(tmp_path, **plain), where)
    assert (cell.job, cell.epochs) == ("train", 200)  # supervised, the first row
    with pytest.raises(config.ConfigError, match="data=.*'HOME=x' is no NAME=FOLDER"):
        job.run(tree_of(tmp_path, data=("HOME=x",)), where)


def test_each_run_of_a_study_is_priced_and_those_that_it_begins_with(tmp_path, capsys):
    # Table 3 of P2 measures detectors alone.
    tree = tree_of(tmp_path, study="p2_table3", size="full", commands="aot")
    job.run(tree, tmp_path / "work" / "x")
    lines = capsys.readouterr().out.splitlines()
    for recipe, count in (("mae", 5), ("rmae", 1), ("cmae", 1), ("detect", 2)):
        assert sum(f"configs/{recipe}.py" in line for line in lines) == count, recipe


def test_two_processes_do_not_make_the_same_cell(tmp_path):
    """The one that waits goes on once the other is done."""
    found = cells.Cells([], config.build(tree_of(tmp_path)), tmp_path / "runs")
    cell = found.of(tiny_study.MAE, 0)
    bench = work.Bench(tmp_path / "runs", tmp_path / "cells", "digits")
    program = (
        "import pathlib, sys, time\n"
        "from mim_jax.run.rundir import claim\n"
        "with claim(pathlib.Path(sys.argv[1])):\n"
        "    print('taken', flush=True)\n"
        "    time.sleep(1.5)\n"
        "    pathlib.Path(sys.argv[2]).touch()\n"
    )
    done = tmp_path / "done"
    command = [sys.executable, "-c", program, str(bench.lock(cell)), str(done)]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"taken\n"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(work, "_WAIT", 0.05)
            with work._claimed(bench.lock(cell)):
                assert done.exists()


def test_mistakes_are_told(tmp_path):
    for leaves, message in (
        (dict(study="tinny"), "did you mean 'tiny'"),
        (dict(only="short"), "config.only: cell 'short' is unknown"),
        (dict(seeds=(0, 0)), "seeds=(0, 0): want each once"),
        (dict(minutes=-1.0), "minutes=-1.0: want at least 0"),
        (dict(recipes="nowhere"), "config file"),
    ):
        with pytest.raises(config.ConfigError) as caught:
            job.run(tree_of(tmp_path, **leaves), tmp_path / "work" / "tiny")
        assert message in str(caught.value)
