# SPDX-License-Identifier: Apache-2.0
"""--doctor and --check: what they say and refuse, and that they leave nothing."""

import pathlib
import re
import shutil
import subprocess
import sys

import environments
import jax
import numpy as np
import pytest
import tiny

from mim_jax import config
from mim_jax.aot import doctor
from mim_jax.run import files, rundir

ROOT = pathlib.Path(__file__).parents[1]
OLD = ROOT / "tests" / "fixtures" / "old_runs" / "mae" / "run"


def tree(**changes):
    changes = dict(data__prefetch=1, checkpoint__every=5) | changes
    return tiny.tree_of("mae", **changes)


def snapshot(folder: pathlib.Path) -> dict[str, bytes | None]:
    return {
        str(path): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """(lines by their first word, what is left) of a run that would start."""
    folder = tmp_path_factory.mktemp("doctor")
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr(doctor, "_say", lambda word, text: lines.append((word, text)))
        with jax.numpy_dtype_promotion("standard"):
            doctor.examine(tree(), folder / "not" / "there", price=7200.0)
    return dict(lines), snapshot(folder)


def test_it_leaves_nothing(said):
    assert said[1] == {}


def test_it_says_what_the_run_has_and_takes(said):
    lines, _ = said
    assert lines["devices"] == "8 x cpu, 1 host(s); mesh data 8 x fsdp 1 x tensor 1"
    assert lines["source"] == "digits: 1442 images, read as 8x8x1; 355 held out"
    assert lines["held-out"].startswith("64 images read in ")
    assert lines["held-out"].endswith(", 0 unreadable")
    assert lines["memory"].startswith("fits: peak ")
    assert re.fullmatch(r"16 MiB written in \S+ s and read back .* free", lines["disk"])
    assert re.fullmatch(r"\d+ images/s by each host; 0 of \d+ .*", lines["reading"])
    assert lines["doctor"] == "nothing stands in the way"


def test_time_and_cost_are_those_of_the_steps_that_are_left(capsys):
    pace = doctor._Pace(reading=3.0, computing=2.0)
    assert pace.step == 3.0
    one = object.__new__(doctor._Training)
    one._plan = tiny.plan_of("mae", stop_after=30)
    one._length(6, pace, 50.0)
    waiting, run = capsys.readouterr().out.splitlines()
    assert waiting.split(None, 1)[1].startswith("33% of the time for data")
    # 24 steps of 3 s at 50 an hour.
    assert run == (
        "the run     24 steps, 0.02 hours without checkpoints and evaluations; at 50 "
        "an hour 1.00"
    )


# What stands in the way.


def refused(workdir, kind, matching, **changes):
    before = snapshot(workdir)
    with pytest.raises(kind, match=matching):
        doctor.examine(tree(**changes), workdir)
    assert snapshot(workdir) == before


def test_a_run_that_is_there_is_asked(tmp_path):
    other = tree(seed=5)
    (tmp_path / "config.json").write_text(config.dumps(other))
    refused(tmp_path, config.ConfigError, r"config.seed: 5 -> 0")
    refused(
        tmp_path,
        config.ConfigError,
        r"batch_size=15 .*: want a multiple of",
        batch_size=15,
    )
    with rundir.claim(tmp_path, "train"):
        refused(tmp_path, rundir.InUseError, "in use by")


@pytest.mark.parametrize(
    "fault, matching", [("full", "want more room"), ("bits", "does not hold")]
)
def test_a_disk_is_tried(tmp_path, monkeypatch, fault, matching):
    if fault == "full":
        usage = shutil.disk_usage(tmp_path)._replace(free=10)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    else:
        write = files.write
        wrong = lambda path, content: write(path, content[:-1])  # noqa: E731
        monkeypatch.setattr(files, "write", wrong)
    refused(tmp_path, files.DiskError, matching)


def test_a_step_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    step = tiny.step_of(tiny.plan_of("mae", 8))
    monkeypatch.setattr(doctor, "_memory", lambda: 1000)
    monkeypatch.setattr(doctor, "lowered", lambda _: Compiled(step))
    wanted = r"config: the step may not fit: .*; try --config.accumulate=2"
    refused(tmp_path, config.ConfigError, wanted)


class Compiled:
    """A traced step that is compiled already."""

    def __init__(self, step):
        self._step = step

    def compile(self):
        return self._step


def test_a_loss_that_is_not_finite_is_refused(tmp_path):
    one = doctor._Training(tree(), tmp_path)
    batch = {"image": np.zeros((16, 8, 8, 1), np.uint8)}
    bad = {"ok": np.False_, "loss": np.float32(np.nan)}
    with pytest.raises(FloatingPointError, match="loss nan or its gradient"):
        one._stepped(lambda state, *_: (state, bad), batch)


# Other jobs.


def evaluation(run):
    found = config.experiment("eval", eval="knn")
    found.run = str(run)
    return found


def test_an_evaluation_reads_its_run_and_asks_for_its_data(tmp_path, capsys):
    with jax.numpy_dtype_promotion("standard"):
        doctor.examine(evaluation(OLD), tmp_path / "out")
    lines = capsys.readouterr().out
    assert ": its checkpoint is read, its data are there" in lines
    assert "nothing stands in the way" in lines
    assert snapshot(tmp_path) == {}
    with pytest.raises(config.ConfigError, match="no config.json there"):
        doctor.examine(evaluation(tmp_path / "none"), tmp_path / "out")


# Without the devices.


def checked(monkeypatch, capsys, one, devices=8):
    asked = {}
    monkeypatch.setattr(jax.config, "update", asked.__setitem__)  # JAX has begun
    doctor.check(one, devices)
    assert asked.get("jax_num_cpu_devices", devices) == devices
    return capsys.readouterr().out


def test_a_command_is_checked_for_the_devices_of_another_machine(monkeypatch, capsys):
    assert (
        checked(monkeypatch, capsys, tree()) == "checked: MAE on 8 devices, 40 steps\n"
    )
    with pytest.raises(config.ConfigError, match="want a multiple of 8"):
        checked(monkeypatch, capsys, tree(batch_size=20))
    with pytest.raises(config.ConfigError, match="want data \\* fsdp \\* tensor = dev"):
        checked(monkeypatch, capsys, tree(mesh__fsdp=16))


def test_what_is_not_here_is_not_checked_and_named(monkeypatch, capsys):
    one = config.read(f"{ROOT}/configs/finetune.py")
    one.init_from.run = "bucket/runs/mae"
    one.data.source.data_dir = "bucket/tfds"
    out = checked(monkeypatch, capsys, one)
    assert "; not checked: init_from.run=bucket/runs/mae is not here" in out
    assert "; not checked: photos: the data of tfds are not here" in out
    # Its number of steps follows from data that are not here.
    assert out.startswith("checked: Supervised on 8 devices, 100 epochs; not checked")
    assert one.init_from.run == "bucket/runs/mae"
    out = checked(monkeypatch, capsys, evaluation("bucket/runs/mae"))
    assert out == "checked: the config of job 'eval'; no run and no data\n"


def test_the_program_checks_for_more_devices_than_there_are(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mim_jax.main", "--check=32"),
            *("--config=mae:digits", f"--workdir={tmp_path / 'run'}"),
        ],
        env=environments.newcomer(),
        capture_output=True,
        text=True,
    )
    assert done.stdout == "checked: MAE on 32 devices, 600 steps\n", done.stderr
    assert done.returncode == 0 and not (tmp_path / "run").exists()
