# SPDX-License-Identifier: Apache-2.0
"""The examples in docstrings of mim_jax/run, and README's of an encoder, run."""

import ast
import doctest
import importlib
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import pytest

from mim_jax import sharding, state
from mim_jax.state import TrainState

ROOT = pathlib.Path(__file__).parents[1]
RUN = ROOT / "mim_jax" / "run"
OLD = ROOT / "tests" / "fixtures" / "old_runs"


def examples(path: pathlib.Path) -> dict[str, str]:
    """Docstrings with an example by the names of what they describe."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            text = ast.get_docstring(node)
            if text and ">>>" in text:
                found[getattr(node, "name", path.stem)] = text
    return found


EXAMPLES = [
    (path.stem, name, text)
    for path in sorted(RUN.glob("*.py"))
    for name, text in examples(path).items()
]


@pytest.fixture(autouse=True)
def a_run(tmp_path, monkeypatch):
    """The working directory has a run called runs/mae."""
    shutil.copytree(OLD / "mae" / "run", tmp_path / "runs" / "mae")
    monkeypatch.chdir(tmp_path)


def first_state() -> TrainState:
    value = TrainState(
        step=jnp.int32(100),
        params={"encoder": {"norm": jnp.ones(8)}},
        teacher=None,
        stats={},
        opt_state=(),
        key=state.run_key(0),
    )
    return jax.device_put(value, sharding.by_path(value, sharding.Mesh().build()))


@pytest.mark.parametrize(
    "module, name, text", EXAMPLES, ids=[f"{x}.{y}" for x, y, _ in EXAMPLES]
)
def test_an_example_gives_what_it_says(module, name, text):
    names = dict(vars(importlib.import_module(f"mim_jax.run.{module}")))
    names["state"] = first_state()
    test = doctest.DocTestParser().get_doctest(text, names, name, module, 0)
    told = []
    result = doctest.DocTestRunner().run(test, out=told.append)
    assert result.attempted and not result.failed, "".join(told)


def test_readme_loads_a_model():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (block,) = [text for text in blocks if "mim_jax.load" in text]
    names = {}
    exec(block, names)
    assert names["features"].shape == (2, names["model"].width)
    assert names["filled"].images.shape == names["images"].shape
    assert len(names["looks"]) == 2
