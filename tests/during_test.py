# SPDX-License-Identifier: Apache-2.0
"""Evaluations while a run trains: what they write, and that they change nothing.

The runs are real, but for the step and the first state, which are compiled once.
"""

import json
import os
import shutil
import signal
import threading

import jax
import metrics_test
import numpy as np
import pytest
import tiny
from PIL import Image

from mim_jax import config, train
from mim_jax.compare.losses import curves, logged
from mim_jax.evals.base import Eval
from mim_jax.evals.knn import KNN
from mim_jax.evals.reconstruction import Reconstruction
from mim_jax.evals.robustness import Robustness
from mim_jax.plan import Plan
from mim_jax.run import loading, storage
from mim_jax.run.checkpoint import Checkpointer
from mim_jax.run.files import DiskError
from mim_jax.run.interrupt import Interrupted
from mim_jax.run.log import read_rows
from mim_jax.run.monitor import Monitor

STEPS = 6
SMALL = dict(images=8, draws=1, inpainted=0, rows=1)


def tree_of(**changes) -> config.Tree:
    tree = tiny.tree_of("mae", **tiny.SPREAD)
    tree.report = config.choose(Eval, "reconstruction", **SMALL)
    tree.steps = STEPS
    tree.checkpoint.update(dict(every=2, keep=9))
    tree.log.update(dict(every=2, tensorboard=False, progress="lines"))
    for name, value in changes.items():
        tree[name] = value
    return tree


@pytest.fixture(scope="module")
def compiled():
    """The step and what makes the first state: every run of this file has them."""
    with pytest.MonkeyPatch.context() as patch:
        tiny.share(patch, tiny.spread_plan("mae"))
        yield


def run(workdir, tree=None, **changes) -> None:
    tree = tree_of(**changes) if tree is None else tree
    # Strict promotion is for our own code; here a whole program runs, optax included.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        train.run(tree, workdir)


def split(workdir) -> tuple[list[dict], list[dict]]:
    """The rows of training and those of evaluations, without times."""
    timing = ("images_per_second", "input_wait_share")
    rows = [
        {k: v for k, v in row.items() if k not in timing and not k.endswith("seconds")}
        for row in read_rows(workdir / "metrics.jsonl")
    ]
    return [r for r in rows if "loss" in r], [r for r in rows if "loss" not in r]


def state_of(workdir, step=STEPS) -> dict[str, bytes]:
    plan = tiny.spread_plan("mae")
    with Checkpointer(workdir, plan.settings.checkpoint) as checkpointer:
        found, state, _ = checkpointer.restore(plan.abstract_state())
    assert found == step
    return tiny.bits(state)


@pytest.fixture(scope="module")
def plain(compiled, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "plain"
    run(workdir)
    return workdir


@pytest.fixture(scope="module")
def measured(compiled, tmp_path_factory):
    """(directory, how often the closing report's evaluation ran)."""
    workdir, calls = tmp_path_factory.mktemp("runs") / "measured", []
    measure = Reconstruction.measure
    tree = tree_of(evaluate_every=4)
    tree.log.tensorboard = True
    with pytest.MonkeyPatch.context() as patch:

        def counted(self, run, data):
            calls.append((run.step, self))
            return measure(self, run, data)

        patch.setattr(Reconstruction, "measure", counted)
        run(workdir, tree)
    return workdir, calls


def test_evaluations_change_no_bit_and_no_line_of_training(plain, measured):
    workdir, _ = measured
    assert state_of(workdir) == state_of(plain)
    ours, theirs = split(workdir), split(plain)
    assert ours[0] == theirs[0] and [row["step"] for row in ours[0]] == [2, 4, 6]
    assert theirs[1] == []


def test_rows_and_files_of_every_fourth_step_and_of_the_last(measured):
    workdir, calls = measured
    _, rows = split(workdir)
    assert [row["step"] for row in rows] == [4, 6]
    for row in rows:
        for key in ("knn/accuracy_model_k10", "knn/accuracy_untrained_k10"):
            assert 0 < row[key] < 1
        assert row["reconstruction/images"] == 8
        folder = workdir / "report" / f"step-{row['step']}"
        assert {path.name for path in folder.iterdir()} == {
            *("knn.json", "knn.npz", "knn.png"),
            *("reconstruction.json", "reconstruction.npz", "reconstruction.png"),
        }
        values = json.loads((folder / "reconstruction.json").read_text())
        assert row["reconstruction/psnr_model_db"] == values["psnr_model_db"]
    assert rows[0]["knn/images"] == rows[1]["knn/images"] == 355
    assert rows[0] != rows[1] | {"step": 4}
    full = read_rows(workdir / "metrics.jsonl")
    for row in full:
        if "loss" not in row:
            assert 0 < row["knn/seconds"] < row["evaluation_seconds"]
    # The closing report has what the last step measured, with its settings.
    assert calls == [(step, Reconstruction(**SMALL)) for step in (4, 6)]
    closing = (workdir / "report" / "reconstruction.json").read_text()
    last = (workdir / "report" / "step-6" / "reconstruction.json").read_text()
    assert closing == last


@pytest.fixture(scope="module")
def loaded(measured):
    """The checkpoint of step 4, by its caption, as other programs read it."""
    return loading.load_all((str(measured[0]),), 4)


def test_the_numbers_are_those_of_the_checkpoint(measured, loaded):
    (one,) = loaded.values()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        report = KNN().measure(one.run, one.passes)
    _, (row, _) = split(measured[0])
    for key, value in report.scalars.items():
        assert row[f"knn/{key}"] == pytest.approx(value, abs=0.003), key  # one image


def test_tensorboard_shows_numbers_and_pictures(measured):
    workdir, _ = measured
    shown = metrics_test.shown(workdir)
    _, rows = split(workdir)
    key = "knn/accuracy_model_k10"
    assert shown[4, key] == pytest.approx(rows[0][key], rel=1e-6)
    pictures = {
        (event.step, value.tag): value.image
        for event in metrics_test.events(workdir)
        for value in event.summary.value
        if value.HasField("image")
    }
    names = {"knn/knn", "reconstruction/reconstruction"}
    assert pictures.keys() == {(step, name) for step in (4, 6) for name in names}
    assert pictures[4, "knn/knn"].width > 100


def test_the_curves_have_a_line_for_every_number(plain, measured):
    workdir, _ = measured
    assert (plain / "report" / "curves.png").stat().st_size > 1000
    with Image.open(workdir / "report" / "curves.png") as picture:
        assert min(picture.size) > 500


@pytest.mark.slow
def test_a_resumed_run_may_change_what_is_measured(measured, tmp_path, capsys):
    run(tmp_path, evaluate_every=2, evaluate_with=("knn",), stop_after=2)
    run(tmp_path, evaluate_every=3, evaluate_with=("attention",))
    training, rows = split(tmp_path)
    assert [row["step"] for row in training] == [2, 4, 6]
    assert [row["step"] for row in rows] == [2, 3, 6]
    groups = [{key.split("/")[0] for key in row} - {"step"} for row in rows]
    assert groups == [{"knn"}, {"attention"}, {"attention"}]
    assert state_of(tmp_path) == state_of(measured[0])
    assert "step 3/6  attention, " in capsys.readouterr().out
    run(tmp_path, evaluate_every=3, evaluate_with=("attention",))  # nothing is left
    assert split(tmp_path)[1] == rows


@pytest.mark.slow
def test_a_signal_while_measuring_saves_and_leaves_and_it_is_made_up_for(
    plain, compiled, tmp_path, monkeypatch, capfd
):
    measure, left = KNN.measure, threading.Event()

    def asked(self, run, data):
        os.kill(os.getpid(), signal.SIGTERM)
        assert left.wait(120), "the run waited for the evaluation"
        raise ValueError

    leaves = dict(evaluate_every=4, evaluate_with=("knn",))
    tree = tree_of(**leaves)
    tree.checkpoint.every = 100
    monkeypatch.setattr(KNN, "measure", asked)
    with pytest.raises(Interrupted):
        run(tmp_path, tree)
    left.set()
    assert split(tmp_path)[1] == [] and not (tmp_path / "report").exists()
    state_of(tmp_path, 4)
    monkeypatch.setattr(KNN, "measure", measure)
    run(tmp_path, tree)
    assert "resumed from step 4" in capfd.readouterr().out
    training, rows = split(tmp_path)
    assert [row["step"] for row in rows] == [4, 6]
    assert state_of(tmp_path) == state_of(plain) and training == split(plain)[0]


def test_a_run_that_lost_its_config_takes_no_other(plain, compiled, tmp_path):
    config_file = plain / "config.json"
    record = storage.read_record(plain / "checkpoints", STEPS)
    assert record["extra"]["config"] == json.loads(config_file.read_text())
    workdir = shutil.copytree(plain, tmp_path / "run")
    (workdir / "config.json").unlink()
    tree = tree_of()
    tree.optim.base_lr, tree.seed = 0.5, 7
    with pytest.raises(config.ConfigError) as caught:
        run(workdir, tree)
    told = str(caught.value)
    assert " -> 0.5" in told and "config.seed: 0 -> 7" in told
    assert not (workdir / "config.json").exists()
    run(workdir)
    assert (workdir / "config.json").read_bytes() == config_file.read_bytes()


def test_a_directory_that_is_moved_meanwhile_does_not_appear_anew(
    plain, compiled, tmp_path, monkeypatch
):
    workdir, away = tmp_path / "run", tmp_path / "away"
    dispatched = Monitor.dispatched

    def moved(self, step, *rest):
        if step == 4:
            workdir.rename(away)
        return dispatched(self, step, *rest)

    monkeypatch.setattr(Monitor, "dispatched", moved)
    with pytest.raises(DiskError, match="run' is no longer there: it was moved"):
        run(workdir)
    assert [path.name for path in tmp_path.iterdir()] == ["away"]
    monkeypatch.undo()
    assert Monitor.dispatched is dispatched
    run(away)
    assert state_of(away) == state_of(plain) and split(away) == split(plain)


def test_an_evaluation_that_refuses_is_told_and_training_goes_on(
    plain, compiled, tmp_path, monkeypatch, capsys
):
    def refuse(self, run, data):
        raise ValueError("no image of class 7 can be read")

    monkeypatch.setattr(KNN, "measure", refuse)
    run(tmp_path, evaluate_every=4)
    out = capsys.readouterr().out.splitlines()
    told = "step 4/6  knn could not measure: no image of class 7 can be read"
    assert out.count(told) == 1
    _, rows = split(tmp_path)
    assert [row["step"] for row in rows] == [4, 6]
    assert {key.split("/")[0] for key in rows[0]} == {"step", "reconstruction"}
    assert state_of(tmp_path) == state_of(plain)


# What is chosen, and what is refused.


def built(name: str, source: str = "digits", **leaves) -> config.Tree:
    tree = config.read(f"configs/{name}.py:{source}")
    for path, value in leaves.items():
        tree[path] = value
    return tree


@pytest.mark.parametrize(
    "name, source, want",
    [
        ("mae", "digits", ["knn", "reconstruction"]),
        ("mae", "photos", ["reconstruction"]),
        ("cmae", "digits", ["knn"]),
        ("supervised", "digits", ["knn", "robustness"]),
    ],
)
def test_without_names_what_fits_is_measured(name, source, want):
    settings = config.build(built(name, source, evaluate_every=9))
    assert list(settings.evaluations) == want
    assert config.build(built(name, source)).evaluations == {}


def test_settings_are_those_of_the_closing_report():
    tree = built("mae", evaluate_every=9)
    tree.report.images = 5
    found = config.build(tree).evaluations
    assert found["reconstruction"] == Reconstruction(images=5)
    assert found["knn"] == KNN()
    tree = built("supervised", evaluate_every=9)
    assert tree.report.sets  # shifts, which nobody asked for every nine steps
    assert config.build(tree).evaluations["robustness"] == Robustness()
    tree.evaluate_with = ("robustness",)
    settings = config.build(tree)
    assert settings.evaluations == {"robustness": settings.report}


@pytest.mark.parametrize(
    "tree, message",
    [
        (
            lambda: built("mae", evaluate_every=0),
            "evaluate_every=0: want 1 <= ",
        ),
        (
            lambda: built("mae", evaluate_every=9, evaluate_with=("nn",)),
            "evaluate_with='nn' is unknown; known: reconstruction, knn, linear, ",
        ),
        (
            lambda: built("mae", evaluate_with=("knn",)),
            "evaluate_with=('knn',) and evaluate_every=None: want evaluate_every=N",
        ),
        (
            lambda: built("cmae", evaluate_every=9, evaluate_with=("reconstruction",)),
            "config.evaluate_with: reconstruction measures the run every 9 steps: "
            "reconstruction of a CMAE run: want an objective that predicts pixels",
        ),
        (
            lambda: built(
                "supervised", evaluate_every=9, evaluate_with=("shape_bias",)
            ),
            "config.evaluate_with: shape_bias measures the run every 9 steps: set ",
        ),
        (
            lambda: built("mocov3", "source=photos", evaluate_every=9),
            "evaluate_every=9: no evaluation fits MoCoV3 on images without labels",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(tree, message):
    tree = tree()
    tree.batch_size = 8
    with pytest.raises(config.ConfigError) as caught:
        Plan.of(tree)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_readers_of_the_log_pass_over_rows_of_evaluations(measured, loaded):
    (one,) = loaded.values()
    name = "$x^$, step 6"  # which is no formula
    figure = curves({name: one}, {name: logged(one.folder)})
    assert figure is not None
    (line,) = figure.axes[0].lines
    losses = [row["loss"] for row in split(measured[0])[0]]
    np.testing.assert_array_equal(line.get_xydata(), np.c_[[2, 4, 6], losses])
