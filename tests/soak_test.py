# SPDX-License-Identifier: Apache-2.0
"""A few kills by the command that kills runs at random, and what it compares."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import soak
from etils import epath

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.every_change
def test_a_run_that_is_killed_at_random_moments_ends_bit_exact(tmp_path):
    words = ["--kills=4", "--kinds", "mae", "--seed=1", f"--folder={tmp_path}"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    environment.pop("XLA_FLAGS")
    command = [sys.executable, "tests/soak.py", *words]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\n4 of 4 kills ended bit-exact, in " in done.stdout

    # What would not have been exact is found.
    twin = epath.Path(tmp_path) / "runs" / "twin-mae"
    assert soak.compare(twin, twin) == 0
    other = epath.Path(shutil.copytree(twin, tmp_path / "other"))
    rows = (other / "metrics.jsonl").read_text()
    (other / "metrics.jsonl").write_text(rows + rows.splitlines()[-1] + "\n")
    assert soak.compare(other, twin) == 1
    (other / "metrics.jsonl").write_text(rows)
    report = json.loads((other / "report" / "step-8" / "knn.json").read_text())
    (other / "report" / "step-8" / "knn.json").write_text(json.dumps(report | {"x": 1}))
    assert soak.compare(other, twin) == 1
    shutil.copy(twin / "report/step-8/knn.json", other / "report/step-8/knn.json")
    assert soak.compare(other, twin) == 0
    last = other / "checkpoints" / str(soak.STEPS)
    shutil.rmtree(last / "state")
    shutil.copytree(other / "checkpoints/20/state", last / "state")
    assert soak.compare(other, twin) == 1


def test_what_was_not_exact_is_counted():
    results = [
        soak.Result("mae", "0 0", ["save", "step"], ""),
        soak.Result("cmae", "0 1", ["save"], "it differs"),
    ]
    assert soak.summary(results) == (
        "by phase: save 2, step 1\nby kind: cmae 1, mae 2\n"
        "2 of 3 kills ended bit-exact, in 2 runs"
    )


def test_the_command_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    asked, whole = [], []

    def made(kind, workdir, *_):
        whole.append(pathlib.Path(workdir).name)
        report = pathlib.Path(workdir) / "report"
        report.mkdir(parents=True)
        (report / "curves.png").write_text("")

    def disturbed(name, seed, place, folder, most):
        asked.append((name, seed, most))
        return soak.Result(name, seed, ["step"] * min(most, 3), "")

    monkeypatch.setattr(soak, "run_whole", made)
    monkeypatch.setattr(soak, "exists", lambda place: pathlib.Path(place).exists())
    monkeypatch.setattr(soak, "disturbed", disturbed)
    place = str(tmp_path / "runs")
    for kills in (4, 7):
        results = soak.soak(["mae", "finetune"], kills, 9, place, tmp_path)
    assert whole == ["twin-mae", "twin-finetune"]
    assert asked == [
        ("mae", "9 0", 4),
        ("finetune", "9 1", 1),
        ("mae", "9 2", 3),
    ]
    assert "7 of 7 kills ended bit-exact, in 3 runs" in soak.summary(results)
