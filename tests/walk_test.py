# SPDX-License-Identifier: Apache-2.0
"""What README and docs/architecture.md say of the code's structure is so."""

import ast
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def output_of(*command: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_readme_says_how_much_there_is_to_read_of_a_step():
    *rows, total = output_of("benchmarks/walk.py")
    lines, files = map(int, re.findall(r"\d+", total))
    assert sum(int(row.split()[0]) for row in rows) == lines and len(rows) == files
    text = " ".join((ROOT / "README.md").read_text().split())
    claim = re.search(r"enters (\d+) lines of code in (\d+) files", text)
    assert claim and (int(claim[1]), int(claim[2])) == (lines, files)
    before = re.search(r"it was (\d+) lines in (\d+) files", text)
    assert before and lines <= 0.6 * int(before[1]) and files <= 9
    named = re.findall(r"\d\. \[`mim_jax/([\w/]+\.py)`\]", text)
    assert {row.split()[1].rstrip(":") for row in rows} >= set(named) and len(
        named
    ) == 5
    assert len((ROOT / "mim_jax" / "train.py").read_text().splitlines()) <= 250


def test_the_picture_of_the_rooms_is_of_this_code(tmp_path):
    listed = output_of("docs/rooms.py", str(tmp_path / "rooms.svg"))
    edges = dict(line.split(": ") for line in listed)
    package = ROOT / "mim_jax"
    rooms = {path.parent.name for path in package.glob("*/__init__.py")}
    rooms |= {path.stem for path in package.glob("*.py")} - {"__init__", "__main__"}
    assert edges.keys() == rooms
    assert "optim" in edges["train"].split(", ") and edges["schema"] == "-"
    for path in (tmp_path / "rooms.svg", ROOT / "docs" / "rooms.svg"):
        stated = re.search(r"<dc:description>(.*?)</", path.read_text(), re.DOTALL)
        assert stated and stated[1].splitlines() == listed, (
            f"{path} is of other code: run python docs/rooms.py"
        )
    text = (ROOT / "docs" / "architecture.md").read_text()
    for room in rooms:
        assert f"`{room}" in text, f"docs/architecture.md does not tell of {room}"


def test_the_functions_that_the_page_names_are_there():
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(r"`([\w/]+\.py): ([\w.]+)`", text)
    assert len(named) > 10
    for path, name in named:
        body = ast.parse((ROOT / "mim_jax" / path).read_text()).body
        for part in name.split("."):
            found = [one for one in body if getattr(one, "name", None) == part]
            assert found, f"docs/architecture.md: {path} has no {name}"
            body = getattr(found[0], "body", [])
