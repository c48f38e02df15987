# SPDX-License-Identifier: Apache-2.0
"""README's first command, in full: what the embedded run promises a newcomer."""

import json
import pathlib
import subprocess
import sys

import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.main_job
def test_the_main_job_learns_to_fill_in_photographs(tmp_path):
    readme = (ROOT / "README.md").read_text()
    flag = "--config=configs/mae.py:photos"
    assert f"python -m mim_jax.main {flag} --workdir=runs/photos" in readme
    workdir = tmp_path / "photos"
    subprocess.run(
        [sys.executable, "-m", "mim_jax.main", flag, f"--workdir={workdir}"],
        cwd=ROOT,
        check=True,
        timeout=1200,
    )
    report = json.loads((workdir / "report" / "reconstruction.json").read_text())
    assert report["psnr_model_db"] > report["psnr_untrained_db"] + 3
    assert report["psnr_model_db"] > report["psnr_visible_mean_db"] + 0.5
    with Image.open(workdir / "report" / "reconstruction.png") as picture:
        assert min(picture.size) > 400
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < 0.8 * losses[0]
    assert {"step", "loss", "lr", "images_per_second"} <= json.loads(lines[-1]).keys()
