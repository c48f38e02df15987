# SPDX-License-Identifier: Apache-2.0
"""launch/watch.sh: starts a run again, and deletes what costs for nothing."""

import os
import pty
import shutil
import subprocess

import pytest
from stand_ins import (
    LAUNCH,
    ROOT,
    TAKE_ARGUMENTS,
    Fakes,
    nightly,
    python_of_a_host,
)


@pytest.fixture
def fakes(tmp_path):
    return Fakes(tmp_path)


def watch(fakes, looks, code, *, queue=("ACTIVE",), node=("READY",), **env):
    """What was started, and said, while the hosts answered so."""
    hosts = [
        look if look[0] == "!" else ",".join(f"host {word}" for word in look.split())
        for look in looks
    ]
    fakes.answer(look=hosts, queue=queue, node=node)
    done = fakes.run("watch", "--", "--workdir=bucket/runs/a b", code=code, **env)
    verbs = {"create": "create", "delete": "delete", "scp": "set up"}
    started = []
    for call in fakes.calls():
        started += [verbs[word] for word in call[4:5] if word in verbs]
        if "tmux new-session" in call[-1]:
            assert "--workdir=bucket/runs/a" in call[-1]
            started.append("run")
    return started, done.stderr


AGAIN = ["set up", "run", "set up", "run"]


def test_watch_ends_with_the_run(fakes):
    looks = ["running running", "running running", "running 0", "0 0"]
    assert watch(fakes, looks, 0)[0] == ["set up", "run"]


@pytest.mark.parametrize(
    "code, others",
    [
        *[(1, " 134"), (2, ""), nightly(2, " running"), (3, " 0"), (4, " 75")],
        *[nightly(4, " 137"), (5, " 75"), nightly(5, " 134")],
    ],
)
def test_watch_stops_where_starting_again_would_not_help(fakes, code, others):
    started, error = watch(fakes, [f"{code}{others}"], code)
    assert started == ["set up", "run"]
    assert f"exit code {code}: " in error
    assert "mim costs until launch/delete_vm.sh gives it back" in error


@pytest.mark.parametrize(
    "first", ["75 75", nightly("75 134"), nightly("134 137"), "lost running,lost 0"]
)
def test_watch_starts_again_after_75_and_after_a_lost_host(fakes, first):
    assert watch(fakes, [*first.split(","), "0 0"], 0)[0] == AGAIN


def test_watch_never_tires_of_75(fakes):
    started, _ = watch(fakes, [*["75 75"] * 4, "0 0"], 0)
    assert started.count("run") == 5


def test_watch_gives_up_on_a_run_that_always_crashes(fakes):
    started, error = watch(fakes, ["134 134"], 1)
    assert started.count("run") == 3 and "giving up" in error


def test_watch_forgets_crashes_of_a_run_that_lasted(fakes):
    looks = ["134", "134", *["running"] * 10, "134", "0"]
    assert watch(fakes, looks, 0)[0].count("run") == 4


@pytest.mark.parametrize("step", ["", nightly("resumed from step 500")])
def test_watch_gives_up_on_a_run_that_never_gets_further(fakes, step):
    """Say, memory is short in an evaluation: that fails after an hour, each time."""
    fakes.answer(began=[step])
    started, error = watch(fakes, [*["running"] * 10, "137"] * 9, 1)
    assert started.count("run") == 3 and "giving up" in error


def test_watch_lets_a_run_be_lost_as_often_as_it_gets_further(fakes):
    fakes.answer(began=["", *(f"resumed from step {step}" for step in range(5))])
    looks = [*[*["running"] * 10, "137"] * 4, "0"]
    assert watch(fakes, looks, 0)[0].count("run") == 5


@pytest.mark.parametrize("end", ["SUSPENDED", nightly("SUSPENDING"), nightly("FAILED")])
def test_watch_replaces_what_was_taken(fakes, end):
    # Seen by create twice, after the hosts fell silent, then by create again.
    queue = [
        "ACTIVE",
        "ACTIVE",
        end,
        *(["SUSPENDED"] if end == "SUSPENDING" else [end]),
    ]
    queue += ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    started, _ = watch(fakes, ["running", "!255", "0"], 0, queue=queue)
    assert started == ["set up", "run", "delete", "create", "set up", "run"]


def test_watch_replaces_a_machine_that_was_preempted(fakes):
    node = ["READY", "READY", "PREEMPTED", "PREEMPTED", "READY"]
    started, _ = watch(fakes, ["running", "!255", "0"], 0, node=node)
    assert started == ["set up", "run", "delete", "create", "set up", "run"]


def test_watch_outlives_a_line_that_drops(fakes):
    started, _ = watch(fakes, ["running", "!255", "running", "0"], 0)
    assert started == AGAIN  # both leave alone what is there


def test_watch_outlives_hours_without_a_network(fakes):
    """What it has seen is there, and costs, whoever can ask for it or not."""
    looks = ["running", "!255", "0"]
    fakes.answer(list=["!1"])
    queue = ["ACTIVE", "ACTIVE", *["!1"] * 20, "ACTIVE"]
    started, error = watch(fakes, looks, 0, queue=queue)
    assert started[0] == "set up" and set(started) == {"set up", "run"}
    assert error.count("mim is UNKNOWN") > 3 and "giving up" not in error


def test_watch_does_not_take_another_command_for_its_own(fakes):
    """It would be called done, and its TPU deleted, without one step of this one."""
    with (fakes.home / "env.sh").open("a") as env:
        env.write("OVER=delete\n")
    python_of_a_host(fakes)
    (fakes.home / "host" / "mim_jax" / "command").write_text("another one\n")
    (fakes.home / "session").touch()
    fakes.answer(look=["host 0"], queue=["ACTIVE"], node=["READY"])
    done = fakes.run("watch", "--", "--workdir=bucket/runs/a", code=2)
    assert "this command was not started" in done.stderr
    assert not fakes.asked("queued-resources", "delete")


# What cannot mend itself


def test_watch_says_what_it_could_not_delete(fakes):
    with (fakes.home / "env.sh").open("a") as env:
        env.write("OVER=delete\n")
    fakes.answer(list=["!1"])
    queue = ["ACTIVE", "ACTIVE", "!1"]
    started, error = watch(fakes, ["0 0"], 0, queue=queue)
    assert "could not be deleted and may cost" in error and "mim is gone" not in error


@pytest.mark.parametrize("look, code", [("2 134", 2), ("0 0", 0), ("134 134", 1)])
def test_watch_deletes_what_costs_for_nothing_if_it_is_told_to(fakes, look, code):
    with (fakes.home / "env.sh").open("a") as env:
        env.write("OVER=delete\n")
    (fakes.home / "remote").write_text("error: config has no field 'lr'")
    started, error = watch(fakes, [look], code)
    assert started[-1] == "delete" and "mim is gone" in error
    assert code == 0 or "error: config has no field 'lr'" in error


def test_watch_deletes_no_run_directory(fakes):
    with (fakes.home / "env.sh").open("a") as env:
        env.write("OVER=delete ACCELERATOR=v5litepod-8\n")
    fakes.answer(look=["host 0"], queue=["ACTIVE"], node=["READY"])
    done = fakes.run("watch", "--", "--workdir=runs/a")
    assert "fetch.sh first" in done.stderr
    assert not fakes.asked("queued-resources", "delete")


@pytest.mark.parametrize(
    "answer, deleted", [("y", 1), ("n", 0), nightly("", 0), (None, 0)]
)
def test_watch_asks_before_it_deletes(fakes, answer, deleted):
    fakes.answer(look=["host 2"], queue=["ACTIVE"], node=["READY"])
    words = [str(LAUNCH / "watch.sh"), "--", "--workdir=bucket/runs/a"]
    terminal, theirs = pty.openpty()
    process = subprocess.Popen(
        words,
        env=fakes.env | {"PATIENCE": "1"},
        stdin=theirs,
        stderr=subprocess.PIPE,
        text=True,
    )
    if answer is not None:
        os.write(terminal, f"{answer}\n".encode())
    _, error = process.communicate(timeout=30)
    assert process.returncode == 2 and "exit code 2: " in error
    assert len(fakes.asked("queued-resources", "delete")) == deleted
    os.close(terminal)
    os.close(theirs)


def test_watch_gives_up_where_no_request_can_be_made(fakes):
    """A project that does not exist, say: that is no preemption."""
    (fakes.home / "bin" / "gcloud").write_text("#!/bin/bash\nexit 1\n")
    done = fakes.run("watch", "--", "--workdir=bucket/runs/a", code=1)
    assert "failed 3 times in a row: giving up" in done.stderr


# Before a TPU is asked for

NOTHING_ASKED = "the command cannot work: nothing was asked for"


@pytest.mark.parametrize(
    "script, settings, name",
    [
        ("create_vm", "PROJECT=my-project", "PROJECT=my-project"),
        ("watch", "PROJECT=my-project", "PROJECT=my-project"),
        ("watch", "BUCKET=my-bucket", "BUCKET=my-bucket"),
        (
            "gke_jobset",
            "IMAGE=x/my-project/a",
            "IMAGE=x/my-project/a",
        ),
    ],
)
def test_placeholders_are_refused(fakes, script, settings, name):
    with (fakes.home / "env.sh").open("a") as env:
        env.write(f"{settings}\n")
    words = ["--", "--workdir=bucket/x"] if script in TAKE_ARGUMENTS else []
    done = fakes.run(script, *words, code=2)
    assert f"{name}" in done.stderr and "is a placeholder: edit" in done.stderr
    assert fakes.calls() == []
    assert "is a placeholder" in fakes.run(script, "--dry-run", *words).stdout


def test_the_settings_as_they_come_are_refused(fakes):
    done = fakes.run("watch", "--", "--workdir=bucket/x", code=2, LAUNCH_ENV="")
    assert "PROJECT=my-project is a placeholder" in done.stderr


@pytest.mark.parametrize(
    "setting", ["OVER=Delete", "POLL=a", "CRASHES=", "CRASHES=0", "ACCELERATOR=v4"]
)
def test_settings_that_decide_what_costs_are_checked_first(fakes, setting):
    with (fakes.home / "env.sh").open("a") as env:
        env.write(f"{setting}\n")
    done = fakes.run("watch", "--", "--workdir=bucket/x", code=2)
    assert f"watch: {setting}: want " in done.stderr and fakes.calls() == []


def test_settings_of_an_older_version_are_enough(fakes):
    """What watch.sh read last is what it does when the run is over."""
    with (fakes.home / "env.sh").open("a") as env:
        env.write("unset CHECK OVER CRASHES COMPILED\n")
    python = fakes.home / "bin" / "python"
    shutil.copy(fakes.home / "bin" / "srun", python)
    fakes.env["PYTHON"] = str(python)
    _, error = watch(fakes, ["3 3"], 3)
    assert "mim costs until launch/delete_vm.sh gives it back" in error


def test_settings_are_found_from_any_folder(fakes):
    fakes.env["LAUNCH_ENV"] = "env.sh"  # in the folder from where it is started
    (fakes.home / "bin" / "env.sh").write_text("exit 9\n")  # first in PATH
    done = fakes.run("slurm", "--", "--config=x")
    ((_, *words),) = fakes.calls()
    job = subprocess.run(
        words[words.index("--") - 1 :],
        env=fakes.env | {"SLURM_JOB_ID": "7", "LAUNCH_ENV": exported(fakes)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, job.returncode) == (0, 0), job.stderr


def exported(fakes) -> str:
    """The LAUNCH_ENV that a job inherits."""
    text = f"cd {fakes.home}; source {LAUNCH}/common.sh; printenv LAUNCH_ENV"
    done = subprocess.run(
        ["bash", "-c", text], env=fakes.env, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_code_that_git_does_not_know_asks_for_no_machine(fakes):
    launch = fakes.home / "unpacked" / "launch"
    shutil.copytree(LAUNCH, launch)
    for script, code in (("watch", 2), ("setup_vm", 128)):
        words = ["--", "--workdir=bucket/x"] if script == "watch" else []
        done = subprocess.run(
            [launch / f"{script}.sh", *words],
            env=fakes.env | {"GIT_CEILING_DIRECTORIES": str(fakes.home)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == code and "not a git repository" in done.stderr
        assert fakes.calls() == []


@pytest.mark.parametrize(
    "accelerator, devices", [("v5litepod-32", 32), ("v4-32", 16), ("v5p-8", 4)]
)
@pytest.mark.parametrize("code", [0, 1, 2])
def test_watch_checks_the_command_first(fakes, code, accelerator, devices):
    python = fakes.home / "bin" / "python"
    shutil.copy(fakes.home / "bin" / "srun", python)
    fakes.answer(python=[f"!{code}"])
    fakes.env["PYTHON"] = str(python)
    with (fakes.home / "env.sh").open("a") as env:
        env.write(f"CHECK=true ACCELERATOR={accelerator}\n")
    fakes.answer(look=["host 0"], queue=["ACTIVE"], node=["READY"])
    words = ["--config=configs/mae.py", "--workdir=bucket/a b"]
    done = fakes.run("watch", "--", *words, code=2 if code else 0)
    first, *others = fakes.calls()
    assert first == ["python", "-m", "mim_jax.main", *words, f"--check={devices}"]
    assert bool(others) == (code == 0)
    assert (NOTHING_ASKED in done.stderr) == (code == 2)
    assert ("could not be checked here" in done.stderr) == (code == 1)


def test_a_misspelt_config_asks_for_no_machine(fakes):
    """With the program itself."""
    with (fakes.home / "env.sh").open("a") as env:
        env.write("CHECK=true\n")
    words = ["--config=configs/mae.py", "--workdir=bucket/a", "--config.optim.bas_lr=1"]
    done = fakes.run("watch", "--", *words, code=2)
    assert "error: config.optim has no field 'bas_lr'" in done.stderr
    assert NOTHING_ASKED in done.stderr and fakes.calls() == []


@pytest.mark.parametrize(
    "words, settings, said",
    [
        (["--config=x"], "", "no --workdir among the arguments"),
        (["--workdir=runs/x"], "", "want --workdir=bucket/runs/x"),
        (["--workdir=bucket/x"], "BUCKET=", "BUCKET is empty"),
    ],
)
def test_a_work_directory_that_hosts_do_not_share_is_refused(
    fakes, words, settings, said
):
    with (fakes.home / "env.sh").open("a") as env:
        env.write(f"{settings}\n")
    done = fakes.run("watch", "--", *words, code=2)
    assert said in done.stderr and fakes.calls() == []
