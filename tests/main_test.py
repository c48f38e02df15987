# SPDX-License-Identifier: Apache-2.0
"""The program as a user starts it: where its output goes, and what it says of a record
that is wrong."""

import json
import os
import pathlib
import subprocess
import sys

import environments
import pytest
from absl.testing import flagsaver

from mim_jax import config, main
from mim_jax.data.fields import DataError, ExampleError
from mim_jax.run.checkpoint import CheckpointError
from mim_jax.run.files import DiskError
from mim_jax.run.interrupt import Interrupted
from mim_jax.run.log import MetricsError
from mim_jax.run.monitor import NonFiniteError
from mim_jax.run.rundir import NotSharedError
from mim_jax.run.spikes import SpikeError

ROOT = pathlib.Path(__file__).parents[1]
SMALL = {
    "batch_size": 8,
    "objective.encoder.depth": 1,
    "data.threads": 1,
    "log.every": 1,
    "log.progress": "lines",
    "report.rows": 1,
    "report.neighbours": 1,
    "report.k": "(3,)",
    "compile_cache": "false",
}
LATE = """
import dataclasses

from mim_jax import config
from mim_jax.data.sources.base import Source
from mim_jax.data.sources.digits import Digits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Late(Source):
    held: bool = False

    def __len__(self):
        return 16

    def __getitem__(self, index):
        record = Digits()[index + 16 * self.held]
        return record | ({"label": None} if index == WRONG else {})

    @property
    def classes(self):
        return Digits().classes

    @property
    def channels(self):
        return 1

    def held_out(self):
        return dataclasses.replace(self, held=True)

    def fingerprint(self):
        return {"name": "late", "held": self.held}


config.register("late", Late)
"""


def command(workdir: pathlib.Path, choices: str, **leaves) -> list[str]:
    return [
        *(sys.executable, "-m", "mim_jax.main", f"--workdir={workdir}"),
        f"--config={ROOT}/configs/mae.py:digits,eval=knn{choices}",
        *(f"--config.{name}={value}" for name, value in (SMALL | leaves).items()),
    ]


def environment(*folders: pathlib.Path) -> dict[str, str]:
    paths = [*map(str, folders), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return environments.small(PYTHONPATH=os.pathsep.join(paths))


def test_a_run_goes_on_when_nobody_reads_its_output(tmp_path):
    process = subprocess.Popen(
        command(tmp_path / "run", "", **{"steps": 4, "data.workers": 0}),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None and process.stdout.readline()
    process.stdout.close()  # as `| head -1` does
    assert process.wait(timeout=300) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert (tmp_path / "run" / "report" / "knn.json").exists()


@pytest.mark.parametrize("late, workers", [(0, 1), (9, 1)])
def test_a_record_that_is_wrong_is_one_line(tmp_path, late, workers):
    (tmp_path / "late.py").write_text(LATE.replace("WRONG", str(late)))
    done = subprocess.run(
        [
            *command(
                tmp_path / "run",
                ",source=late",
                **{"steps": 4, "data.workers": workers},
            ),
            "--plugins=late",
        ],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr
    (line,) = [one for one in done.stderr.splitlines() if one.startswith("error: ")]
    assert "Traceback" not in done.stderr
    if late:
        assert line.startswith("error: Crops.train for a record of Late raised TypeErr")
        assert "loss" in done.stdout or "parameters" in done.stdout
    else:
        assert line.startswith("error: config: Late[0] returned 'label' as None: ")
        assert not (tmp_path / "run").exists()


def left(monkeypatch, arguments: list[str], job) -> int | None:
    """The exit code of `main` in this process, with another job "train"."""

    class Left(Exception):
        pass

    def leave(code):
        raise Left(code)

    argv = ["main", "--workdir=run", "--config=configs/mae.py:digits", *arguments]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(
        main.jax.distributed, "shutdown", lambda: job.append("together")
    )
    monkeypatch.setitem(main.JOBS, "train", lambda config, workdir: raising(job[0]))
    with flagsaver.flagsaver(), pytest.raises(Left) as caught:
        main.parse(argv)
        main.main(argv)
    return caught.value.args[0]


@pytest.mark.parametrize(
    "count, number, said",
    [
        ("two", "0", "JAX_NUM_PROCESSES in the environment is 'two': want a number"),
        ("2", None, "JAX_PROCESS_ID in the environment is not set: want a number"),
        ("2", "-1", "JAX_PROCESS_ID in the environment is '-1': want a number"),
    ],
)
def test_an_environment_of_no_processes_is_one_line(
    monkeypatch, capfd, count, number, said
):
    monkeypatch.setenv("JAX_NUM_PROCESSES", count)
    monkeypatch.delenv("JAX_PROCESS_ID", raising=False)
    if number is not None:
        monkeypatch.setenv("JAX_PROCESS_ID", number)
    assert left(monkeypatch, ["--distributed"], [AssertionError()]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: --distributed: ") and said in line


def raising(error: Exception):
    raise error


@pytest.mark.parametrize(
    "error, code, together",
    [
        (config.ConfigError("a"), 2, False),
        (ExampleError("a"), 2, False),
        (NotSharedError("a"), 2, True),
        (NonFiniteError("a"), 3, True),
        (SpikeError("a"), 3, True),
        (CheckpointError("a"), 4, False),
        (DiskError("a"), 4, False),
        (MetricsError("a"), 4, False),
        (DataError("a"), 5, False),
        (Interrupted(), 75, True),
    ],
)
def test_each_reason_to_end_has_its_exit_code(
    monkeypatch, capfd, error, code, together
):
    job = [error]
    assert left(monkeypatch, [], job) == code
    assert ("together" in job) == together
    assert capfd.readouterr().err == (
        "saved; the same command goes on from here\n" if code == 75 else "error: a\n"
    )


def test_hosts_that_all_give_up_shut_down_together(monkeypatch):
    error = DataError("a")
    error.everywhere = True
    job = [error]
    assert left(monkeypatch, [], job) == 5 and "together" in job


def test_what_the_command_line_gives_is_compared_with_the_run_to_begin_with(
    monkeypatch, capfd, tmp_path
):
    (tmp_path / "config.json").write_text(
        config.dumps(config.read(f"{ROOT}/configs/cmae.py:digits"))
    )
    arguments = [
        f"--config.init_from.run={tmp_path}",
        "--config.objective.mean=(0.7,)",
    ]
    assert left(monkeypatch, arguments, [AssertionError("it trained")]) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: config.objective.mean=(0.7,): ")
    assert "decides it, and has (0.3,)" in said


@pytest.mark.parametrize("flag", ["--doctor", "--check=8"])
def test_a_command_that_is_only_tried_starts_nothing(monkeypatch, capfd, flag):
    asked = []

    def tries(*given, **named):
        asked.append((len(given), named))
        raise config.ConfigError("it would not work")

    monkeypatch.setattr(main.doctor, "examine", tries)
    monkeypatch.setattr(main.doctor, "check", tries)
    arguments = [flag, "--price=3"]
    assert left(monkeypatch, arguments, [AssertionError("it trained")]) == 2
    assert asked == [(2, {"price": 3.0} if flag == "--doctor" else {})]
    assert capfd.readouterr().err == "error: it would not work\n"
