# SPDX-License-Identifier: Apache-2.0
"""benchmarks/identify.py in short: a code of the dimension of c holds c."""

import json
import os
import pathlib
import subprocess
import sys

import environments
import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_a_code_of_the_dimension_of_c_holds_c_and_little_else(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "identify.py")]
    options = ["--seeds=1", "--steps=1000", f"--out={tmp_path / 'runs'}"]
    done = subprocess.run(
        [*command, *options],
        cwd=tmp_path,
        env=environments.newcomer(PYTHONPATH=os.fspath(ROOT)),
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "runs" / "results.json").read_text())["runs"]
    assert found.keys() == {"one token", "one square"}
    for (numbers,) in found.values():
        # Children are noisy: of c the visible part tells so much, and no code more.
        most = numbers["c from visible"]
        assert 0.5 * most < numbers["c from code"] < most + 0.03
        assert numbers["c from code"] > numbers["c from untrained code"] + 0.3
        assert numbers["rest from code"] < 0.2
