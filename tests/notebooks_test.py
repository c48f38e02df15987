# SPDX-License-Identifier: Apache-2.0
"""Notebooks run from top to bottom in a fresh kernel, and are kept without outputs."""

import ast
import pathlib

import environments
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def read(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path):
    code = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert code
    for cell in code:
        assert cell.outputs == [] and cell.execution_count is None, cell.source


@pytest.mark.slow
@pytest.mark.every_change
def test_the_quickstart_learns_what_it_says(tmp_path):
    notebook = read(ROOT / "notebooks" / "quickstart.ipynb")
    # The kernel is a newcomer's: one device, no settings of these tests.
    environment = environments.newcomer(PYTHONPATH=str(ROOT), TMPDIR=str(tmp_path))
    client = NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute(env=environment)  # raises where a cell does

    outputs = {cell.id: cell.get("outputs", []) for cell in notebook.cells}
    data = [x.data for found in outputs.values() for x in found if "data" in x]
    pictures = [one for one in data if "image/png" in one]
    # Masks, loss, reconstruction, CKA.
    assert len(pictures) == 4
    assert all(len(one["image/png"]) > 5000 for one in pictures)
    noise = [
        x.text for found in outputs.values() for x in found if x.get("name") == "stderr"
    ]
    assert noise == []

    def value(name):
        (output,) = outputs[name]
        return ast.literal_eval(output.data["text/plain"])

    psnr = value("psnr")
    assert psnr["model"] > psnr["untrained"] + 3
    assert psnr["model"] > psnr["patch_mean"] + 0.5
    accuracy = value("accuracy")
    assert accuracy["trained"]["10-NN"] > accuracy["untrained"]["10-NN"] + 0.05
    assert accuracy["trained"]["linear"] > 0.8
