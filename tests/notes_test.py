# SPDX-License-Identifier: Apache-2.0
"""summary.txt tells a person who finds a run directory what it is."""

import pathlib
import re

import pytest

import mim_jax
from mim_jax.run import notes

PACKAGE = pathlib.Path(mim_jax.__file__).parent


@pytest.mark.parametrize(
    "program, said",
    [
        (PACKAGE / "main.py", "python -m mim_jax.main"),
        (PACKAGE / "__main__.py", "python -m mim_jax"),
        ("/usr/bin/mim-jax", "/usr/bin/mim-jax"),
        ("main.py", "main.py"),  # a user's own program
    ],
)
def test_the_command_can_be_given_again(monkeypatch, tmp_path, program, said):
    monkeypatch.chdir(tmp_path)
    words = ["--config=mae:mnist", "--config.seeds=(0, 1)", "--workdir=it's mine"]
    monkeypatch.setattr("sys.argv", [str(program), *words])
    notes.begin(tmp_path, "source      mnist")
    text = (tmp_path / "summary.txt").read_text()
    (command,) = re.findall(r"^command     (.*)$", text, re.MULTILINE)
    assert command == (
        f"{said} --config=mae:mnist '--config.seeds=(0, 1)' "
        """'--workdir=it'"'"'s mine'"""
    )
    assert "source      mnist\n" in text and mim_jax.__version__ in text


def test_a_later_result_replaces_the_earlier_one(tmp_path):
    notes.begin(tmp_path, "source      mnist")
    before = (tmp_path / "summary.txt").read_text()
    for result in ("10 dB", "12 dB"):
        notes.end(tmp_path, result)
    assert (tmp_path / "summary.txt").read_text() == f"{before}\nresult\n12 dB\n"
