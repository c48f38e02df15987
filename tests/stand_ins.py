# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for what the launch scripts call: gcloud, kubectl, Slurm, tmux."""

import ast
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest

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


def nightly(*case):
    """A case like others: slow."""
    return pytest.param(*case, marks=pytest.mark.slow)


def python_of_a_host(fakes, code=0) -> None:
    """A home directory as setup_vm.sh leaves it, whose Python writes down its words."""
    python = fakes.home / "host" / "mim_jax" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    shutil.copy(fakes.home / "bin" / "srun", python)
    fakes.answer(python=[f"!{code}"])


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
