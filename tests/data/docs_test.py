# SPDX-License-Identifier: Apache-2.0
"""Examples in docs/data.md and in docstrings of data/ run as they stand."""

import ast
import doctest
import importlib
import pathlib
import re

import numpy as np
import pytest

from mim_jax.data.examples import EXAMPLES
from mim_jax.data.sources import SOURCES

ROOT = pathlib.Path(__file__).parents[2]
DATA = ROOT / "mim_jax" / "data"


def docstrings():
    """(module, name, text) of every docstring with an example."""
    for path in sorted(DATA.rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if ">>>" in text:
                    yield pytest.param(module, node.name, text, id=node.name)


FOUND = list(docstrings())


@pytest.mark.parametrize(("module", "name", "text"), FOUND)
def test_docstring_examples_run(module, name, text):
    names = dict(vars(importlib.import_module(module)))
    test = doctest.DocTestParser().get_doctest(text, names, name, module, 0)
    said = []
    doctest.DocTestRunner().run(test, out=said.append)
    assert not said, "".join(said)


def test_there_are_docstring_examples():
    assert {"train_batches", "eval_batches", "Input", "View"} <= {
        param.id for param in FOUND
    }


def test_the_page_on_data_runs(monkeypatch, capsys):
    for table in (SOURCES, EXAMPLES):  # the page adds rows
        for name in ("squares", "boxes"):
            monkeypatch.setitem(table, name, None)
            monkeypatch.delitem(table, name)
    text = (ROOT / "docs" / "data.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    names = {"__name__": "page"}
    for block in blocks:
        exec(block, names)
    assert capsys.readouterr().out.startswith("(8, 2, 4) ")
    batch = names["batch"]
    images, boxes, real = batch["image"], batch["boxes"], batch["boxes_valid"]
    assert real[:, 0].sum() > 4 and not real[:, 1].any()
    for image, (box, *_), (there, *_) in zip(images, boxes, real, strict=True):
        white = image[..., 0] > 127
        if not there:
            assert white.mean() < 0.02 and (box == -1).all()
            continue
        rows, cols = np.flatnonzero(white.any(1)), np.flatnonzero(white.any(0))
        want = [rows[0], cols[0], rows[-1] + 1, cols[-1] + 1]
        np.testing.assert_allclose(box * 32, want, atol=0.6)
    data = names["data"]
    data.check_offers(("image", "boxes", "boxes_valid"), "Reader")
    # The source alone offers its latents.
    plain = type(data)(source=data.source, image_size=(32, 32), workers=0)
    plain.check_offers(("image", "latents"), "Reader")
