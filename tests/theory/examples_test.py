# SPDX-License-Identifier: Apache-2.0
"""The examples in docstrings of mim_jax/theory run as they stand."""

import ast
import doctest
import importlib
import pathlib
import re

import pytest

ROOM = pathlib.Path(__file__).parents[2] / "mim_jax" / "theory"


def examples():
    for path in sorted(ROOM.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Module):
                text = ast.get_docstring(node) or ""
                if ">>>" in text:
                    name = getattr(node, "name", path.stem)
                    yield pytest.param(path.stem, name, text, id=f"{path.stem}.{name}")


@pytest.mark.parametrize("module, name, text", list(examples()))
def test_an_example_gives_what_it_says(module, name, text):
    names = dict(vars(importlib.import_module(f"mim_jax.theory.{module}")))
    test = doctest.DocTestParser().get_doctest(text, names, name, module, 0)
    said = []
    result = doctest.DocTestRunner().run(test, out=said.append)
    assert result.attempted and not said, "".join(said)


def test_the_page_says_what_its_examples_give():
    text = (ROOM.parents[1] / "docs" / "theory.md").read_text()
    located, bounded, estimated = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    exec(located, names)
    found = names["found"]
    said = re.search(r"found\.levels  # (.*)", located)
    assert said and said[1] == f"{set(found.c)}, {set(found.s_m)}, {found.levels}"
    *lines, last = bounded.strip().splitlines()
    exec("\n".join(lines), names)
    bounds = eval(last, names)
    said = re.search(r"# optimum (\S+), floor (\S+)", last)
    assert said and said.groups() == (f"{bounds.optimum:.2f}", f"{bounds.floor:.2f}")
    *lines, last = estimated.strip().splitlines()
    exec("\n".join(lines), names)
    assert f"{eval(last, names)}: " in last
