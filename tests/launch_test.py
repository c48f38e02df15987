# SPDX-License-Identifier: Apache-2.0
"""The scripts of launch/, with stand-ins for gcloud, kubectl, Slurm and tmux."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from stand_ins import (
    ENTRIES,
    HARD,
    LAUNCH,
    ROOT,
    SCRIPTS,
    TAKE_ARGUMENTS,
    Fakes,
    python_of_a_host,
    until,
)


@pytest.fixture
def fakes(tmp_path):
    return Fakes(tmp_path)


def arguments(script) -> list[str]:
    count = ["2"] if script == "local" else []
    return [*count, "--", *HARD] if script in TAKE_ARGUMENTS else []


def test_shellcheck():
    beside = pathlib.Path(sys.executable).with_name("shellcheck")
    shellcheck = beside if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed; the extra dev brings it")
    done = subprocess.run(
        [shellcheck, "-x", "-P", ROOT, *SCRIPTS], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_scripts_can_be_started_and_stop_at_errors():
    for script in ENTRIES:
        path = LAUNCH / f"{script}.sh"
        assert os.access(path, os.X_OK), script
        assert "\nset -euo pipefail\n" in path.read_text(), script


# --dry-run


@pytest.mark.parametrize("script", ENTRIES)
def test_dry_run_shows_and_does_nothing(fakes, script):
    before = sorted(fakes.home.rglob("*"))
    done = fakes.run(script, "--dry-run", *arguments(script))
    assert done.stderr == ""
    assert done.stdout.count("\n") >= 1
    assert fakes.calls() == []
    assert sorted(fakes.home.rglob("*")) == before


@pytest.mark.parametrize(
    "script", ["create_vm", "setup_vm", "run", "fetch", "delete_vm", "gke_jobset"]
)
def test_what_dry_run_shows_does_the_same(fakes, script):
    shown = fakes.run(script, "--dry-run", *arguments(script)).stdout
    done = subprocess.run(["bash", "-euc", shown], env=fakes.env, cwd=fakes.home)
    assert done.returncode == 0
    copied = fakes.calls()
    # A request that failed: as the notes of --dry-run have it, it is made anew.
    fakes.answer(queue=["FAILED", "ACTIVE"], node=["READY"])
    fakes.run(script, *arguments(script))
    done = fakes.calls()
    if script in ("create_vm", "delete_vm"):  # no machine is asked about, or once less
        copied, done = ([x for x in y if "tpu-vm" not in x] for y in (copied, done))
    assert copied == done


# The same words everywhere


def test_words_arrive_on_a_host_as_they_were_given(fakes):
    python_of_a_host(fakes, code=75)
    fakes.run("run", "--", *HARD)
    started = [call for call in fakes.calls() if call[0] == "python"]
    assert started == [["python", "-m", "mim_jax.main", "--distributed", *HARD]]
    assert (fakes.home / "host" / "mim_jax" / "exit-code").read_text() == "75\n"


def test_compiled_programs_are_kept_where_the_settings_say(fakes):
    """A machine that takes the place of another need not compile again."""
    python_of_a_host(fakes)
    python = fakes.home / "host" / "mim_jax" / ".venv" / "bin" / "python"
    told = fakes.home / "told"
    python.write_text(f'#!/bin/bash\necho "$JAX_COMPILATION_CACHE_DIR" >"{told}"\n')
    fakes.run("run", "--", "--config=x")
    until(lambda: told.read_text() == "bucket/compiled\n")
    fakes.calls()
    fakes.run("gke_jobset", "--", "--config=x")
    ((*_, text),) = fakes.calls()
    (job,) = yaml.safe_load(text)["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    want = {"name": "JAX_COMPILATION_CACHE_DIR", "value": "bucket/compiled"}
    assert container["env"] == [want]
    with (fakes.home / "env.sh").open("a") as env:
        env.write("COMPILED=\n")
    fakes.run("run", "--", "--config=x")
    until(lambda: told.read_text() == "\n")


def test_a_run_that_is_there_is_left_alone(fakes):
    python_of_a_host(fakes)
    fakes.run("run", "--", "--config=configs/mae.py")
    (fakes.home / "session").touch()
    fakes.calls()
    done = fakes.run("run", "--", "--config=configs/mae.py")
    assert "running already: .venv/bin/python" in done.stdout
    assert "--config=configs/mae.py" in done.stdout
    assert [call[0] for call in fakes.calls()] == ["gcloud", "tmux"]
    host = fakes.home / "host" / "mim_jax"
    before = sorted((one, one.stat().st_mtime_ns) for one in host.iterdir())
    done = fakes.run("run", "--", *HARD, code=3)
    assert "another command runs here: .venv/bin/python" in done.stdout
    assert "this command was not started: want the end of that one" in done.stderr
    assert sorted((one, one.stat().st_mtime_ns) for one in host.iterdir()) == before


def test_a_run_that_is_the_same_whatever_its_words_is_left_alone(fakes):
    python_of_a_host(fakes)
    fakes.run("run", "--", *HARD)
    (fakes.home / "session").touch()
    assert "running already: " in fakes.run("run", "--", *HARD).stdout


def test_set_up_changes_nothing_under_a_run(fakes):
    """Its readers start anew at each evaluation, from the code that is there then."""
    (fakes.home / "host").mkdir()
    (fakes.home / "session").touch()
    fakes.run("setup_vm")
    assert not any((fakes.home / "host").iterdir())


def test_a_host_that_shuts_down_lets_the_run_save(fakes):
    if (tmux := shutil.which("tmux")) is None:
        pytest.skip("tmux is not installed")
    python_of_a_host(fakes)
    host = fakes.home / "host" / "mim_jax"
    (host / ".venv/bin/python").write_text(
        "#!/bin/bash\ntrap 'sleep 0.3; exit 75' TERM; echo $$; echo \"$*\"\n"
        "while :; do sleep 0.05; done\n"
    )
    (fakes.home / "bin" / "tmux").unlink()
    fakes.env.pop("TMUX", None)
    fakes.env["TMUX_TMPDIR"] = str(fakes.home)
    fakes.run("run", "--", "--it's=(1,2)")
    until(lambda: (host / "log.txt").read_text().count("\n") == 2)
    pid, words = (host / "log.txt").read_text().splitlines()
    assert words == "-m mim_jax.main --distributed --it's=(1,2)"
    shell = int(pathlib.Path(f"/proc/{pid}/stat").read_text().split()[3])
    os.kill(shell, signal.SIGTERM)
    subprocess.run([tmux, "kill-server"], env=fakes.env, check=True)
    time.sleep(0.3)
    assert not (host / "exit-code").exists()
    os.kill(int(pid), signal.SIGTERM)
    until(lambda: (host / "exit-code").read_text() == "75\n")


def test_words_arrive_in_a_slurm_job_as_they_were_given(fakes):
    fakes.run("slurm", "--", *HARD)
    (call,) = fakes.calls()
    assert call[0] == "sbatch" and "--signal=TERM@180" in call and "--requeue" in call
    script, *rest = call[call.index(str(LAUNCH / "slurm.sh")) :]
    assert rest == ["--", *HARD]
    # Slurm runs a copy of the script.
    copy = fakes.home / "slurm_script"
    shutil.copy(script, copy)
    environment = fakes.env | {"SLURM_JOB_ID": "7", "MIM_LAUNCH": str(LAUNCH)}
    done = subprocess.run([copy, *rest], env=environment, cwd=ROOT)
    assert done.returncode == 0
    (call,) = fakes.calls()
    main = call.index("mim_jax.main")
    assert call[0] == "srun" and call[main - 1 :] == [
        *("-m", "mim_jax.main", "--distributed"),
        *HARD,
    ]


@pytest.mark.parametrize("code, requeued", [(0, False), (3, False), (75, True)])
def test_a_slurm_job_that_was_told_to_leave_comes_back(fakes, code, requeued):
    fakes.answer(srun=[f"!{code}"])
    fakes.run("slurm", "--", "--config=x", code=code, SLURM_JOB_ID="7")
    asked = fakes.asked("scontrol", "requeue", "7")
    assert len(asked) == requeued


def test_words_arrive_in_a_pod_as_they_were_given(fakes):
    fakes.run("gke_jobset", "--", *HARD)
    ((*words, text),) = fakes.calls()
    assert words == ["kubectl", "apply", "--filename=-"]
    spec = yaml.safe_load(text)["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 8 and job["backoffLimit"] == 0
    container = job["template"]["spec"]["containers"][0]
    # Kubernetes leaves a dollar alone unless it stands before ( or another dollar.
    command = [word.replace("$$", "$") for word in container["command"]]
    assert all("$" not in word.replace("$$", "") for word in container["command"])
    assert command == ["python", "-m", "mim_jax.main", "--distributed", *HARD]
    rule = job["podFailurePolicy"]["rules"][0]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert rule["onExitCodes"]["values"] == [1, 2, 3, 4, 5]  # and not 75


def test_no_manifest_without_a_directory_in_common(fakes):
    with (fakes.home / "env.sh").open("a") as env:
        env.write("BUCKET=\n")
    done = fakes.run("gke_jobset", "--", "--config=x", code=2)
    assert "BUCKET is empty" in done.stderr and fakes.calls() == []


# One host, or the bucket


@pytest.mark.parametrize("spelling", ["--workdir={}", "--workdir\n{}"])
@pytest.mark.parametrize(
    "workdir, source",
    [
        ("bucket/runs/a b/", ["gs://bucket-of-mine/runs/a b", "runs/a b"]),
        ("gs://other/runs/mae/", ["gs://other/runs/mae", "runs/mae"]),
        ("runs/mae", ["mim:mim_jax/runs/mae", "runs/"]),
        ("/data/mae", ["mim:/data/mae", "runs/"]),
    ],
)
def test_fetch_knows_where_a_run_lies(fakes, workdir, source, spelling):
    words = spelling.format(workdir).split("\n")
    fakes.run("fetch", "--", "--config=configs/mae.py", *words)
    (call,) = fakes.calls()
    assert [word for word in call if word in source] == source


def test_fetch_mixes_no_two_runs(fakes):
    words = ["--", "--workdir=bucket/runs/mae"]
    fakes.run("fetch", *words)
    fakes.run("fetch", *words)  # again: what is new since
    assert len(fakes.asked("storage", "rsync")) == 2
    for other in ("bucket/others/mae", "gs://theirs/runs/mae", "/data/mae"):
        done = fakes.run("fetch", "--", f"--workdir={other}", code=2)
        assert "runs/mae is there, and is no copy of " in done.stderr
    mine = fakes.home / "runs" / "mine" / "config.json"
    mine.parent.mkdir()
    mine.write_text("{}")
    done = fakes.run("fetch", "--", "--workdir=bucket/runs/mine", code=2)
    assert "no copy of gs://bucket-of-mine/runs/mine: want it moved" in done.stderr
    assert fakes.calls() == [] and [*mine.parent.iterdir()] == [mine]


def test_fetch_wants_a_workdir(fakes):
    done = fakes.run("fetch", "--", "--config=x", code=2)
    assert "no --workdir" in done.stderr and fakes.calls() == []


def test_set_up_carries_what_git_tracks(fakes):
    fakes.run("setup_vm")
    copy, remote = fakes.calls()
    assert "scp" in copy and "--worker=all" in copy and "--worker=all" in remote
    done = subprocess.run(
        ["tar", "-tzf", copy[copy.index("scp") + 1]], capture_output=True, text=True
    )
    names = done.stdout.splitlines()
    assert {"pyproject.toml", "mim_jax/main.py", "configs/mae.py"} <= set(names)
    assert not any(name.startswith((".git/", "runs/")) for name in names)
    script = remote[-1].removeprefix("--command=")
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert done.stderr == ""


@pytest.mark.parametrize("script", ENTRIES)
def test_what_cannot_be_meant_is_refused(fakes, script):
    done = fakes.run(script, "zebra", "--", code=2)
    assert "want" in done.stderr and fakes.calls() == []
    if script in TAKE_ARGUMENTS:
        assert "want" in fakes.run(script, code=2).stderr
        assert fakes.calls() == []


# Create and delete, again and again


@pytest.mark.parametrize(
    "queue, node, verbs",
    [
        (["ACTIVE"], "READY", []),
        (
            ["!1", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"],
            "READY",
            ["create"],
        ),
        (["CREATING", "ACTIVE"], "READY", []),
        (["SUSPENDED", "ACTIVE"], "READY", ["delete", "create"]),
        (["SUSPENDING", "SUSPENDED", "ACTIVE"], "READY", ["delete", "create"]),
        (["FAILED", "ACTIVE"], "READY", ["delete", "create"]),
        (["DELETING", "!1", "ACTIVE"], "READY", ["create"]),
        (["ACTIVE"], "PREEMPTED,READY", ["delete", "create"]),
    ],
)
def test_create_asks_for_what_is_not_there(fakes, queue, node, verbs):
    fakes.answer(queue=queue, node=node.split(","))
    fakes.run("create_vm")
    calls = [call for call in fakes.calls() if "queued-resources" in call]
    calls = [call for call in calls if call[4] != "list"]
    assert [call[4] for call in calls if call[4] != "describe"] == verbs
    for call in calls:
        assert call[5:8] == ["mim", "--project=project", "--zone=zone"]
        assert call[4] != "create" or "--spot" in call


def test_create_says_why_a_request_failed(fakes):
    fakes.answer(queue=["!1", "FAILED", "the quota of zone"])
    done = fakes.run("create_vm", code=1)
    assert "the quota of zone" in done.stderr


@pytest.mark.parametrize("there", [True, False])
def test_delete_deletes_what_is_there(fakes, there):
    fakes.answer(queue=["SUSPENDED" if there else "!1"])
    fakes.run("delete_vm")
    assert len(fakes.asked("queued-resources", "delete", "mim")) == there


@pytest.mark.parametrize("listed", ["!1", "mim", "projects/p/x/queuedResources/mim"])
@pytest.mark.parametrize("script", ["delete_vm", "create_vm"])
def test_what_cannot_be_asked_is_not_called_absent(fakes, script, listed):
    """Without a network or a login. It may cost, and a new request would fail."""
    fakes.answer(queue=["!1"], list=["none-of-mim", listed])
    fakes.run(
        "delete_vm"
    )  # the first answer: another one is there, and this one is not
    fakes.calls()
    done = fakes.run(script, code=1)
    assert "gcloud does not tell whether mim is there" in done.stderr
    assert "gone" not in done.stderr
    verbs = {call[4] for call in fakes.calls()}
    assert verbs == {"describe", "list"}
