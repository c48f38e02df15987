# SPDX-License-Identifier: Apache-2.0
"""The scripts of launch/, with stand-ins for gcloud, kubectl, Slurm and tmux."""

import ast
import json
import os
import pathlib
import pty
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(path for path in LAUNCH.glob("*.sh"))
ENTRIES = [path.stem for path in SCRIPTS if path.stem not in ("env", "common")]
TAKE_ARGUMENTS = ("run", "watch", "fetch", "slurm", "gke_jobset", "local")

# What a shell, ssh, tmux, YAML and Kubernetes each would like to take for themselves.
HARD = [
    "--config=configs/mae.py:digits,masking=grid",
    "--config.data.image_size=(384,384)",
    '--workdir=bucket/it\'s a "run" $HOME $(hostname) `date` \\ $$',
    "--config.note=#1: {a: b} & | ; > < * ? ! ~ % @IMAGE@ \té✓\n second line",
    "--config.empty=",
    "",
    "'",
]

# Writes down its words and stdin. As gcloud it answers with the next line of a file,
# the last one for ever; !3 is exit code 3, and commas are lines. Scripts call it
# thousands of times, so it imports next to nothing.
FAKE = r"""#!{python} -IS
import os, sys
name, words = sys.argv[0].rpartition("/")[2], sys.argv[1:]
home = os.environ["FAKE"] + "/"
text = sys.stdin.read() if name == "kubectl" else ""
with open(home + "calls", "a", encoding="utf-8") as calls:
    calls.write(ascii([name, *words, *([text] if text else [])]) + "\n")
line = " ".join(words)

def run(*command, cwd="."):
    import subprocess
    sys.exit(subprocess.call(command, cwd=cwd))

if name == "tmux" and words[0] == "new-session":
    run(*words[words.index("mim") + 1:])
if name == "tmux":
    sys.exit(not os.path.exists(home + "session"))
command = [word[10:] for word in words if word.startswith("--command=")]
question = (
    "look" if command and "host running" in command[0] else
    "queue" if "queued-resources describe" in line else
    "list" if "queued-resources list" in line else
    "began" if command and "resumed from" in command[0] else
    "node" if "tpu-vm describe" in line else
    "remote" if command else name
)
if question == "remote" and os.path.exists(home + "host"):
    run("bash", "-c", command[0], cwd=home + "host")
if os.path.exists(home + question):
    with open(home + question, encoding="utf-8") as answers:
        answer, *rest = answers.read().split("\n")
    if rest:
        with open(home + question, "w", encoding="utf-8") as answers:
            answers.write("\n".join(rest))
    if answer.startswith("!"):
        sys.exit(int(answer[1:]))
    print(answer.replace(",", "\n"))
"""

ENV = """
source {launch}/env.sh
PROJECT=project ZONE=zone NAME=mim BUCKET=bucket-of-mine IMAGE=image POLL=0 CRASHES=3
CHECK=
"""


class Fakes:
    """A PATH where the tools are stand-ins, and what was asked of them."""

    def __init__(self, home: pathlib.Path):
        self.home = home
        bin = home / "bin"
        bin.mkdir()
        for name in ("gcloud", "kubectl", "sbatch", "srun", "scontrol", "tmux"):
            (bin / name).write_text(FAKE.replace("{python}", sys.executable))
            (bin / name).chmod(0o755)
        (home / "env.sh").write_text(ENV.format(launch=LAUNCH))
        self.env = os.environ | {
            "PATH": f"{bin}:{os.environ['PATH']}",
            "FAKE": str(home),
            "LAUNCH_ENV": str(home / "env.sh"),
            "PYTHON": sys.executable,
            "TMPDIR": str(home),
        }
        self.env.pop("SLURM_JOB_ID", None)

    def answer(self, **lines: list[str]) -> None:
        for question, answers in lines.items():
            (self.home / question).write_text("\n".join(answers))

    def run(self, script, *words, code=0, **env) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [LAUNCH / f"{script}.sh", *words],
            env=self.env | env,
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code, done.stderr
        return done

    def calls(self) -> list[list[str]]:
        path = self.home / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [ast.literal_eval(line) for line in lines]

    def asked(self, *words) -> list[list[str]]:
        """The calls that have all of these words one after the other."""
        text = " ".join(words)
        return [call for call in self.calls() if text in " ".join(call)]


@pytest.fixture
def fakes(tmp_path):
    return Fakes(tmp_path)


def nightly(*case):
    """A case like others: slow."""
    return pytest.param(*case, marks=pytest.mark.slow)


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


def python_of_a_host(fakes, code=0) -> None:
    """A home directory as setup_vm.sh leaves it, whose Python writes down its words."""
    python = fakes.home / "host" / "mim_jax" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    shutil.copy(fakes.home / "bin" / "srun", python)
    fakes.answer(python=[f"!{code}"])


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


def until(condition, timeout=10) -> None:
    end = time.monotonic() + timeout
    while True:
        try:
            if condition():
                return
        except OSError:
            pass
        assert time.monotonic() < end
        time.sleep(0.02)


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


# Watch


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


@pytest.mark.slow
def test_watch_never_tires_of_75(fakes):
    started, _ = watch(fakes, [*["75 75"] * 4, "0 0"], 0)
    assert started.count("run") == 5


@pytest.mark.slow
def test_watch_gives_up_on_a_run_that_always_crashes(fakes):
    started, error = watch(fakes, ["134 134"], 1)
    assert started.count("run") == 3 and "giving up" in error


@pytest.mark.slow
def test_watch_forgets_crashes_of_a_run_that_lasted(fakes):
    looks = ["134", "134", *["running"] * 10, "134", "0"]
    assert watch(fakes, looks, 0)[0].count("run") == 4


@pytest.mark.parametrize("step", ["", nightly("resumed from step 500")])
def test_watch_gives_up_on_a_run_that_never_gets_further(fakes, step):
    """Say, memory is short in an evaluation: that fails after an hour, each time."""
    fakes.answer(began=[step])
    started, error = watch(fakes, [*["running"] * 10, "137"] * 9, 1)
    assert started.count("run") == 3 and "giving up" in error


@pytest.mark.slow
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


@pytest.mark.slow
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


# Processes on this machine


def local(fakes, count, program, *words, **env) -> subprocess.Popen:
    script = [LAUNCH / "local.sh", str(count), "--", sys.executable, "-c", program]
    # Where tests run in the background Ctrl-C is ignored, which no script can undo.
    heard = "import os, sys, signal; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    heard += "os.execv(sys.argv[1], sys.argv[1:])"
    return subprocess.Popen(
        [sys.executable, "-c", heard, *map(str, script), *words],
        env=fakes.env | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_processes_know_who_they_are(fakes):
    program = (
        "import json, os, sys; found = [os.environ[name] for name in ("
        "'JAX_PROCESS_ID', 'JAX_NUM_PROCESSES', 'JAX_COORDINATOR_ADDRESS')];"
        # One write for each line: the processes share the pipe.
        "os.write(1, (json.dumps(found + sys.argv[1:]) + chr(10)).encode())"
    )
    out, error = local(fakes, 2, program, *HARD).communicate(timeout=30)
    assert error == ""
    found = sorted(json.loads(line) for line in out.splitlines())
    assert [line[:2] for line in found] == [["0", "2"], ["1", "2"]]
    assert found[0][2] == found[1][2] and found[0][2].startswith("localhost:")
    assert all(line[3:] == HARD for line in found)


MINE = "import os, signal, sys, time; me = int(os.environ['JAX_PROCESS_ID']); "


@pytest.mark.parametrize("codes", [(0, 0, 0), (0, 7, 9), (9, 7, 0), (75, 75, 75)])
def test_the_exit_code_is_the_first_that_is_not_0(fakes, codes):
    process = local(fakes, 3, MINE + f"time.sleep(me / 2); sys.exit({codes}[me])")
    assert process.wait(30) == next(filter(None, codes), 0)
    process.communicate()


def test_one_that_dies_takes_the_others_along(fakes):
    program = MINE + (
        "os.write(1, b'%d\\n' % os.getpid()); time.sleep(0.3);"
        "me and os.kill(os.getpid(), signal.SIGKILL); time.sleep(60)"
    )
    before = time.monotonic()
    process = local(fakes, 3, program, GRACE="0.5")
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGKILL
    assert time.monotonic() - before < 15
    for pid in map(int, out.split()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


LEAVING = MINE + (
    "signal.signal(signal.SIGINT, signal.SIG_DFL);"
    "signal.signal(signal.SIGTERM, lambda *_: (time.sleep({}), os._exit(75)));"
    "os.write(1, b'here\\n'); time.sleep(60)"
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_all_to_leave(fakes, number):
    process = local(fakes, 2, LEAVING.format(0.2))
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["here\n"] * 2
    os.killpg(process.pid, number)  # as a terminal does
    assert process.wait(20) == 75
    process.communicate()


def test_a_second_signal_ends_all_at_once(fakes):
    process = local(fakes, 2, LEAVING.format(30))
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["here\n"] * 2
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGKILL
    process.communicate()
