# SPDX-License-Identifier: Apache-2.0
"""README's first command: what the embedded run promises a newcomer."""

import json
import pathlib
import subprocess
import sys

import environments
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parent.parent


# Each change trains for fewer steps than README's command, and expects less.
@pytest.mark.slow
@pytest.mark.parametrize(
    "short, ahead, closer, fallen",
    [
        ([], 2.0, 0.2, 0.6),
        pytest.param(
            ["--config.steps=600"], 1.5, 0.1, 0.7, marks=pytest.mark.every_change
        ),
    ],
    ids=["in full", "600 steps"],
)
def test_the_main_job_learns_to_fill_in_digits(tmp_path, short, ahead, closer, fallen):
    readme = (ROOT / "README.md").read_text()
    flag = "--config=configs/mae.py:mnist"
    assert f"python -m mim_jax.main {flag} --workdir=runs/mnist" in readme
    workdir = tmp_path / "mnist"
    done = subprocess.run(
        [sys.executable, "-m", "mim_jax.main", flag, f"--workdir={workdir}", *short],
        cwd=ROOT,
        env=environments.newcomer(),
        check=True,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    read = lambda name: json.loads((workdir / "report" / name).read_text())  # noqa: E731
    pixels, neighbours = read("reconstruction.json"), read("knn.json")
    model = pixels["psnr_model_where_inpainted_db"]
    assert model > pixels["psnr_biharmonic_db"] + ahead
    assert model > pixels["psnr_untrained_db"] + ahead + 1
    accuracy = neighbours["accuracy_model_k10"]
    assert accuracy > neighbours["accuracy_untrained_k10"] + closer
    # One line says what was learned, beside the simple ways.
    line = done.stdout.splitlines()[-1]
    assert line.startswith(f"learned     hidden pixels at {model:.1f} dB (biharmonic ")
    assert f"10 nearest neighbours find {accuracy:.1%} of the classes (unt" in line
    for name in ("reconstruction", "knn", "curves"):
        with Image.open(workdir / "report" / f"{name}.png") as picture:
            assert min(picture.size) > 300
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < fallen * losses[0]
    assert {"step", "loss", "lr", "images_per_second"} <= json.loads(lines[-1]).keys()
