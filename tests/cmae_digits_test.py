# SPDX-License-Identifier: Apache-2.0
"""benchmarks/cmae_digits.py, the study behind docs/cmae.md."""

import importlib
import json
import os
import pathlib
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.objectives import OBJECTIVES
from mim_jax.objectives.cmae import View
from mim_jax.ops.masking import Mask
from mim_jax.studies import STUDIES

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def inked(monkeypatch):
    """The plug-in's objective. Afterwards the tables are as they were."""
    for table, name in (
        (OBJECTIVES, "cmae_ink"),
        (STUDIES, "cmae_digits"),
        (sys.modules, "benchmarks.cmae_digits"),
    ):
        monkeypatch.setitem(table, name, None)  # so that it is taken back
    del sys.modules["benchmarks.cmae_digits"]
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.cmae_digits").Inked


def test_the_loss_counts_patches_with_ink_alone(inked):
    images = np.zeros((2, 8, 8, 1), np.float32)
    images[0, 0, 5] = 0.9  # first row, second column of patches
    images[1, 7, 7] = 0.1  # too faint
    hidden = jnp.asarray([[0, 1], [0, 1]])
    mask = Mask(keep=jnp.asarray([[2, 3], [2, 3]]), drop=hidden)
    online = View(jnp.asarray(images), mask, None)
    blank = View(jnp.zeros_like(online.images), mask, None)
    encoder = inked().encoder.clone(patch=4)
    found = inked(encoder=encoder)._weights(online, blank)
    assert found.tolist() == [[False, True, False, False], [False] * 4]
    visible = inked(encoder=encoder, positions="online_visible")
    assert not visible._weights(online, blank).any()  # what has ink is hidden


def test_the_study_prints_a_command_for_each_of_its_cells(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mim_jax.main", "--plugins=benchmarks.cmae_digits"),
            *("--config=configs/study.py:mnist", "--config.study=cmae_digits"),
            *("--config.seeds=(0,)", "--config.commands=local"),
            *(f"--workdir={tmp_path}/study", f"--config.results={tmp_path}/results"),
        ],
        cwd=ROOT,
        env=dict(os.environ, JAX_PLATFORMS="cpu"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    cells = re.findall(r"--config\.only=(\S+)", done.stdout)
    assert len(cells) == len(set(cells)) > 30
    assert sum("cmae_ink" in cell for cell in cells) == 3  # and what begins with it
    assert "--plugins=benchmarks.cmae_digits" in done.stdout


def test_the_table_of_the_page_is_what_was_measured():
    page = (ROOT / "docs" / "cmae.md").read_text()
    titles = ("fine-tuned", "10 % of labels", "10-NN")
    assert f"| row | {' | '.join(titles)} |" in page
    rows = json.loads((ROOT / "docs" / "cmae.json").read_text())["rows"]
    for row in rows:
        cells = re.search(rf"^\| {re.escape(row['row'])} \|(.+)\|$", page, re.MULTILINE)
        assert cells, row["row"]
        for title, shown in zip(titles, cells[1].split("|"), strict=True):
            values = list(row["numbers"][f"{title}, %"]["values"].values())
            assert shown.strip() == (f"{values[0]:.1f}" if values else "–")
    shown = re.findall(r"^\| [^|]+\|[^|]+\|[^|]+\|[^|]+\|$", page, re.MULTILINE)
    assert len(shown) == len(rows) + 1  # the titles
