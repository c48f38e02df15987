# SPDX-License-Identifier: Apache-2.0
"""The real process: killed, interrupted, refused and resumed."""

import contextlib
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import environments
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mim_jax.run.parts import read_parts

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 12
TINY = {
    "steps": STEPS,
    "batch_size": 8,
    "objective.encoder.depth": 1,
    "objective.encoder.width": 16,
    "objective.encoder.heads": 2,
    "objective.decoder.depth": 1,
    "objective.decoder.width": 16,
    "objective.decoder.heads": 2,
    "checkpoint.every": 2,
    "log.every": 1,
    "report.images": 1,
    "report.draws": 1,
    "report.inpainted": 0,
    "report.rows": 1,
}
TIMING = ("images_per_second", "input_wait_share")
SAVING = "*.orbax-checkpoint-tmp"

# Only failed saves and reads, which the tests below provoke, leave coroutines behind.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


class Process:
    """`python -m mim_jax.main` on a tiny run, its output going to files."""

    def __init__(self, workdir, leaves=None, *, devices=1, limit=None):
        leaves = TINY | (leaves or {})
        workdir.parent.mkdir(parents=True, exist_ok=True)
        self.workdir = workdir
        self.out = workdir.parent / f"{workdir.name}.out"
        self.err = workdir.parent / f"{workdir.name}.err"
        command = [
            *(sys.executable, "-m", "mim_jax.main", "--config=configs/mae.py:digits"),
            f"--workdir={workdir}",
            *(f"--config.{name}={value}" for name, value in leaves.items()),
        ]
        if limit is not None:  # of every file's size, as if the disk were full
            command = ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "", *command]
        # So that small programs are compiled once in all of these tests, too.
        cache = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        cache["JAX_COMPILATION_CACHE_DIR"] = str(compiled(workdir))
        environment = environments.small(devices, **cache)
        with self.out.open("w") as out, self.err.open("w") as err:
            self._popen = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=out,
                stderr=err,
                start_new_session=True,  # a process group of its own, as in a terminal
            )
        self.pid = self._popen.pid

    def running(self) -> bool:
        return self._popen.poll() is None

    def wait(self, timeout: float = 300) -> int:
        try:
            return self._popen.wait(timeout)
        finally:
            self._popen.kill()

    def until(self, condition, timeout: float = 120) -> bool:
        """Waits for a line of output, or for a function to say yes; False if the
        process ended first."""
        if isinstance(condition, str):
            text = condition
            condition = lambda: text in self.out.read_text()  # noqa: E731
        end = time.monotonic() + timeout
        while not condition():
            if not self.running():
                return False
            assert time.monotonic() < end, f"waited in vain for {condition}"
            time.sleep(0.002)
        return True

    def saving(self) -> bool:
        return any((self.workdir / "checkpoints").glob(SAVING))

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def compiling(self) -> bool:
        """The program that makes the state is compiled: the step is next."""
        return any(compiled(self.workdir).glob("jit_begun-*-cache"))

    def importing_workers(self) -> bool:
        """A worker process is there, and has hardly begun."""
        for child in children(self.pid):
            with contextlib.suppress(OSError):
                command = pathlib.Path(f"/proc/{child}/cmdline").read_bytes()
                if b"spawn_main" in command:
                    return True
        return False

    def stage(self) -> str:
        """How far it has come, as far as one sees."""
        lines = self.out.read_text().splitlines()
        return " ".join(lines[-1].split()[:2]) if lines else "starting"

    def kill(self) -> bool:
        """SIGKILL; False if the process had ended by itself."""
        killed = self.running()
        self._popen.kill()
        self._popen.wait()
        return killed

    @property
    def stderr(self) -> str:
        return self.err.read_text()

    @property
    def stdout(self) -> str:
        return self.out.read_text()


def run(workdir, leaves=None, **options) -> Process:
    """A process that must come to its end, without a word on stderr."""
    process = Process(workdir, leaves, **options)
    assert process.wait() == 0, process.stderr
    assert process.stderr == ""
    return process


def metrics(workdir) -> list[dict]:
    """The rows of training, without times; those of evaluations have no loss."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {name: v for name, v in row.items() if name not in TIMING}
        for row in map(json.loads, lines)
        if "loss" in row
    ]


def final_state(workdir, step=STEPS) -> dict[str, bytes]:
    """Every leaf of the whole TrainState of a checkpoint, as bytes."""
    folder = workdir / "checkpoints" / str(step) / "state"
    with ocp.PyTreeCheckpointer() as reader:
        shapes = reader.metadata(folder).item_metadata.tree
        arrays = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), shapes)
        arguments = ocp.args.PyTreeRestore(restore_args=arrays)
        tree = reader.restore(folder, args=arguments)
    flat = ocp.tree.to_flat_dict(tree, sep="/")
    assert {name.split("/")[0] for name in flat} >= {"params", "opt_state", "key"}
    return {name: np.asarray(leaf).tobytes() for name, leaf in flat.items()}


def assert_same_run(workdir, other) -> None:
    assert metrics(workdir) == metrics(other)
    a, b = final_state(workdir), final_state(other)
    assert a.keys() == b.keys()
    assert [name for name in a if a[name] != b[name]] == []


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nobody disturbs."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    run(workdir)
    assert [line["step"] for line in metrics(workdir)] == list(range(1, STEPS + 1))
    return workdir


def compiled(workdir) -> pathlib.Path:
    """Where the processes of a run keep their compiled programs."""
    return workdir.with_name(f"{workdir.name}.compiled")


def fresh(straight, workdir) -> pathlib.Path:
    """A new run directory that need not compile again."""
    workdir.mkdir(parents=True)
    shutil.copytree(compiled(straight), compiled(workdir))
    return workdir


def children(pid: int) -> list[int]:
    """All processes below one."""
    below = []
    for path in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            below += map(int, path.read_text().split())
    return below + [grandchild for child in below for grandchild in children(child)]


def alive(pid: int) -> bool:
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return text.rsplit(")", 1)[1].split()[0] not in "ZX"


def gone(pids: list[int], timeout: float = 15) -> list[int]:
    """The processes that are still there after a while."""
    end = time.monotonic() + timeout
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return list(filter(alive, pids))


# What a person sees


def test_a_run_says_what_it_does_and_nothing_else(straight):
    out = (straight.parent / "run.out").read_text()
    steps = re.findall(r"^step (\d+)/12  loss [\d.]+  \d+ images/s  ", out, re.M)
    assert steps == [str(step) for step in range(1, STEPS + 1)]
    assert out.count("parameters") == out.count("mim_jax 0.") == 1
    for line in (straight / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        assert {"step", "loss", "lr", "images_per_second"} <= values.keys()
        assert all(np.isfinite(value) for value in values.values())
    assert list((straight / "tensorboard").iterdir())
    assert list((straight / "report").glob("*.json"))
    assert sorted(p.name for p in (straight / "checkpoints").iterdir()) == ["10", "12"]


# Kills


def kill_and_resume(workdir, rng, lifetime, workers, kills, windows):
    """Kills one run again and again; returns (kills, where) once it is done."""
    where = []
    while len(where) < kills:
        process = Process(workdir, {"data.workers": workers})
        if windows and rng.random() < 0.4:
            process.until(process.saving)
            time.sleep(rng.uniform(0, 0.05))
        else:
            deadline = time.monotonic() + rng.uniform(0, lifetime)
            process.until(lambda: time.monotonic() > deadline)  # noqa: B023
        below = children(process.pid)
        if not process.kill():
            assert process.wait() == 0, process.stderr
            break
        where.append(process.stage() + ", saving" * process.saving())
        assert gone(below) == []
        assert "Traceback" not in process.stderr
    # Workers of the killed ones hold no lock, and nothing is told of their end.
    last = Process(workdir, {"data.workers": workers})
    assert last.wait() == 0, last.stderr
    assert last.stderr == ""
    return where


@pytest.mark.slow  # each change has a short soak, tests/soak_test.py
def test_killed_twice_and_resumed_to_the_same_bits(straight, tmp_path):
    workdir = fresh(straight, tmp_path / "run")
    process = Process(workdir, {"data.workers": 1})
    process.until("step 5/")  # step 4 is being saved, so step 2 is there
    below = children(process.pid)
    assert below and process.kill()
    assert gone(below) == []
    process = Process(workdir)
    process.until(process.saving)
    assert process.kill()
    # Workers of a run that comes to its end leave in silence.
    process = Process(workdir, {"data.workers": 1})
    process.until("step 12/")
    below = children(process.pid)
    assert below
    assert process.wait() == 0
    assert process.stderr == ""
    assert gone(below) == []
    assert process.stdout.count("resumed from step") == 1
    assert_same_run(workdir, straight)


@pytest.mark.slow
def test_killed_twenty_times_and_resumed_to_the_same_bits(straight, tmp_path):
    rng = random.Random(0)
    begun = time.monotonic()
    run(fresh(straight, tmp_path / "measured"))
    lifetime = time.monotonic() - begun
    where, round = [], 0
    while len(where) < 20:
        workdir = tmp_path / f"run{round}"
        if round % 3:  # else it compiles, and is killed compiling
            fresh(straight, workdir)
        workers = round % 2
        left = min(4, 20 - len(where))
        where += kill_and_resume(workdir, rng, lifetime, workers, left, round > 0)
        assert_same_run(workdir, straight)
        round += 1
    print(f"{len(where)} kills in {round} runs: {where}")


# Signals


def interrupted(workdir, moment, number=signal.SIGTERM, leaves=None) -> Process:
    """A process that got one signal at a moment, and has left."""
    process = Process(workdir, leaves)
    assert process.until(getattr(process, moment, moment)), process.stderr
    process.send(number)
    assert process.wait(60) == 75, process.stderr
    error = process.stderr
    assert "Traceback" not in error
    assert error == (
        f"\n{number.name}: saving and leaving; once more to leave now\n"
        "saved; the same command goes on from here\n"
    )
    return process


def checkpoints(workdir) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def test_signals_at_every_stage_and_the_same_bits(straight, tmp_path):
    workdir = tmp_path / "run"
    interrupted(workdir, "length  ")  # making the first state: nothing to save
    assert checkpoints(workdir) == []
    interrupted(workdir, "compiling")
    assert checkpoints(workdir) == [0] and metrics(workdir) == []
    interrupted(workdir, "resumed from step 0")  # compiling again
    shutil.copytree(compiled(straight), compiled(workdir), dirs_exist_ok=True)
    leaves = {"data.workers": 1, "checkpoint.every": 100}
    interrupted(workdir, "step 3/", signal.SIGINT, leaves)
    assert metrics(workdir)[-1]["step"] == checkpoints(workdir)[-1] >= 3
    interrupted(workdir, "saving")
    interrupted(workdir, f"step {STEPS}/")  # the report
    assert not (workdir / "report").exists()
    assert "resumed from step 12" in run(workdir).stdout
    assert list((workdir / "report").glob("*.json"))
    assert_same_run(workdir, straight)


@pytest.mark.slow
def test_ctrl_c_while_workers_start_is_no_error(straight, tmp_path):
    workdir = fresh(straight, tmp_path / "run")
    process = Process(workdir, {"data.workers": 2})
    assert process.until(process.importing_workers)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)  # a terminal signals all of the group
    assert process.wait(60) == 75, process.stderr
    assert "Traceback" not in process.stderr
    assert process.stderr.count("\n") == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("delay", [0.3, 1.0])
def test_a_signal_before_there_is_a_state_just_ends(tmp_path, number, delay):
    process = Process(tmp_path / "run")
    time.sleep(delay)  # importing
    process.send(number)
    assert process.wait(60) in (-number, 75)  # as a shell shows it: 128 + number
    assert "Traceback" not in process.stderr
    assert process.stdout == "" or process.wait() == 75


def test_a_second_signal_leaves_at_once_and_loses_little(straight, tmp_path):
    workdir = tmp_path / "run"
    process = Process(workdir)
    process.until("length  ")
    process.send(signal.SIGTERM)
    time.sleep(0.01)
    process.send(signal.SIGINT)
    # Which of the two Python takes as the second is its own business.
    seconds = (128 + signal.SIGINT, 128 + signal.SIGTERM)
    assert process.wait(10) in (75, *seconds)
    assert "Traceback" not in process.stderr


# Exact resume


def five_and_seven(workdir, leaves=None, **options) -> Process:
    run(workdir, (leaves or {}) | {"stop_after": 5}, **options)
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir())[-1] == "5"
    process = run(workdir, leaves, **options)
    assert "resumed from step 5" in process.stdout
    return process


@pytest.mark.slow
def test_twelve_steps_are_five_and_seven(straight, tmp_path):
    five_and_seven(fresh(straight, tmp_path / "run"))
    assert_same_run(tmp_path / "run", straight)


@pytest.mark.slow
@pytest.mark.parametrize("scan, devices", [(True, 1), (True, 8), (False, 8)])
def test_so_they_are_with_scan_and_on_eight_devices(tmp_path, scan, devices):
    # The log's window of 4 steps is cut by the stop.
    leaves = {"scan": scan, "objective.encoder.depth": 2, "log.every": 4}
    straight, workdir = tmp_path / "straight", tmp_path / "run"
    run(straight, leaves, devices=devices)
    five_and_seven(fresh(straight, workdir), leaves, devices=devices)
    assert_same_run(workdir, straight)


def assert_close_run(workdir, other, rtol=1e-5) -> None:
    """Same data and masks: the same losses, to the rounding of another order."""
    ours, theirs = metrics(workdir), metrics(other)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for name in ("loss", "lr", "epoch", "replaced"):
        np.testing.assert_allclose(
            [line[name] for line in ours], [line[name] for line in theirs], rtol=rtol
        )


@pytest.mark.slow
def test_eight_devices_resume_on_one_sharded_on_replicated(straight, tmp_path):
    workdir = tmp_path / "run"
    run(workdir, {"stop_after": 5, "mesh.fsdp": 4}, devices=8)
    accept = {"on_change": "accept"}
    process = run(workdir, {"stop_after": 8} | accept)
    assert "changed     config.mesh.fsdp: 4 -> 1" in process.stdout
    run(workdir, accept | {"mesh.fsdp": 2}, devices=2)
    assert_close_run(workdir, straight)


@pytest.mark.slow
def test_scan_goes_on_from_an_unrolled_checkpoint(straight, tmp_path):
    workdir = fresh(straight, tmp_path / "run")
    run(workdir, {"stop_after": 6})
    leaves = {"scan": True, "on_change": "accept"}
    run(workdir, leaves)
    assert_close_run(workdir, straight)
    assert final_state(workdir).keys() == final_state(straight).keys()
    assert set(read_parts(workdir)[1]["params"]) == {"encoder", "decoder"}


# Refusals and faults


def refused(workdir, code, leaves=None, **options) -> str:
    process = Process(workdir, leaves, **options)
    assert process.wait() == code, process.stderr
    assert "Traceback" not in process.stderr
    return process.stderr


def test_refusals_say_why_and_touch_nothing(straight, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    before = {path: path.read_bytes() for path in workdir.glob("*") if path.is_file()}

    error = refused(workdir, 2, {"optim.base_lr": 0.5})
    assert re.search(r"config.optim.base_lr: [\d.]+ -> 0.5\n", error)
    error = refused(workdir, 2, {"objective.encoder.width": 32, "on_change": "accept"})
    assert "not of this model" in error and "[16, 48] -> float32[32, 96]" in error

    about = workdir / "checkpoints" / "12" / "about" / "metadata"
    shutil.rmtree(workdir / "checkpoints" / "10")
    about.write_text(about.read_text()[:-20])
    error = refused(workdir, 4)
    assert "no checkpoint under" in error and "step 12: JSONDecodeError" in error

    after = {path: path.read_bytes() for path in workdir.glob("*") if path.is_file()}
    for name in ("lock", "parameters.txt"):
        before.pop(workdir / name), after.pop(workdir / name)
    assert before == after


def test_a_second_process_is_refused(straight, tmp_path):
    workdir = fresh(straight, tmp_path / "run")
    first = Process(workdir)
    first.until("length  ")
    second = Process(workdir, {"log.every": 3})  # its output replaces the first's
    assert second.wait() == 2
    assert re.search(rf"is in use by .* pid {first.pid}:", second.stderr)
    assert first.wait() == 0
    assert_same_run(workdir, straight)


def test_another_data_set_is_refused(straight, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    path = workdir / "checkpoints" / "12" / "about" / "metadata"
    about = json.loads(path.read_text())["about"]
    about["extra"]["data"]["images"] = 11
    text = json.dumps(about, sort_keys=True)
    sealed = {"about": about, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    path.write_text(json.dumps(sealed))
    error = refused(workdir, 2)
    assert "the data set differs from the one that this run began with" in error


def test_a_damaged_checkpoint_costs_one_interval(straight, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    manifest = workdir / "checkpoints" / "12" / "state" / "manifest.ocdbt"
    data = bytearray(manifest.read_bytes())
    data[len(data) // 2] ^= 1
    manifest.write_bytes(data)
    process = Process(workdir)
    assert process.wait() == 0
    assert "WARNING: the checkpoint of step 12 is damaged" in process.stderr
    assert process.stderr.count("\n") == 2
    assert "resumed from step 10" in process.stdout
    assert (workdir / "damaged-checkpoints" / "12").is_dir()
    assert_same_run(workdir, straight)


def test_a_full_disk_is_told_and_what_was_saved_stays(straight, tmp_path):
    workdir = fresh(straight, tmp_path / "run")
    run(workdir, {"stop_after": 4})
    process = Process(workdir, limit=8)  # KiB: of a checkpoint, but not of the log
    assert process.wait() == 4, process.stderr
    error = process.stderr
    assert "WARNING: the checkpoint of step 6 could not be saved" in error
    assert "3 times in a row, the checkpoint of step 10 could not be saved" in error
    assert "Newest one on the disk: step 4" in error
    assert "Traceback" not in error and error.count("\n") < 12
    run(workdir)
    assert_same_run(workdir, straight)


def test_a_loss_that_is_not_finite_stops_the_run(straight, tmp_path):
    workdir = tmp_path / "run"
    leaves = {"optim.base_lr": 1e30, "optim.warmup_epochs": 0, "checkpoint.every": 1}
    error = refused(workdir, 3, leaves)
    found = re.search(r"step (\d+): loss \S+ or its gradient is not finite", error)
    assert found, error
    step = int(found[1])
    saved = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert f"Last good checkpoint: step {saved[-1]}." in error
    assert saved[-1] == step - 1
    told = json.loads((workdir / f"nonfinite-step{step}-host0.json").read_text())
    assert len(told["indices"]) == 8
    assert ", ".join(map(str, told["indices"])) in error
    for each in saved:
        for name, leaf in final_state(workdir, each).items():
            if name.startswith("params"):
                assert np.isfinite(np.frombuffer(leaf, np.float32)).all()
    assert [line["step"] for line in metrics(workdir)] == list(range(1, step))
