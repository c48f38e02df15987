# SPDX-License-Identifier: Apache-2.0
"""Notebooks hold the outputs of a run from top to bottom, and show what they say."""

import importlib.util
import json
import pathlib
import re

import environments
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
URL = "https://github.com/someone/theirs"
# What a cell does that leaves something to see.
SHOWS = re.compile(
    r"print\(|subplots\(|Image\(file|^figure$|^picture\(|%%bash|train\.run\(", re.M
)


def load_make():
    spec = importlib.util.spec_from_file_location("make", ROOT / "notebooks/make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = load_make()


def read(name):
    notebook = nbformat.read(ROOT / f"notebooks/{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs_of(notebook):
    return [output for cell in code_of(notebook) for output in cell.outputs]


def pictures_of(notebook):
    data = [output.get("data", {}) for output in outputs_of(notebook)]
    return [one["image/png"] for one in data if "image/png" in one]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_one_run_from_top_to_bottom(name):
    notebook = read(name)
    counts = [cell.execution_count for cell in code_of(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    for cell in code_of(notebook):
        assert cell.outputs or not SHOWS.search(cell.source), cell.id
    assert len(pictures_of(notebook)) >= 2


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_fit_to_be_read_and_kept(name):
    notebook = read(name)
    assert (ROOT / f"notebooks/{name}.ipynb").stat().st_size < 600_000
    for output in outputs_of(notebook):
        assert output.output_type != "error" and output.get("name") != "stderr"
    texts = "\n".join(
        output.get("text", "") + output.get("data", {}).get("text/plain", "")
        for output in outputs_of(notebook)
    )
    for of_this_machine in ("/tmp", "/root", "/home", str(ROOT), "/usr", "/var/"):
        assert of_this_machine not in texts
    # A bar draws itself anew after a carriage return; the pace is of this machine.
    assert not re.search(r"\r|it/s\]|images/s| left$|\bWarning\b", texts, re.M)
    for picture in pictures_of(notebook):
        assert len(picture) < 300_000


def test_all_have_the_same_kernel_and_parameters_to_shorten_them():
    kinds = {json.dumps(read(name).metadata, sort_keys=True) for name in NAMES}
    assert len(kinds) == 1
    for name in NAMES:
        tags = [cell.metadata.get("tags", []) for cell in read(name).cells]
        assert tags.count(["parameters"]) == 1, name


def test_all_are_named_in_the_readme():
    text = (ROOT / "README.md").read_text()
    assert [name for name in NAMES if f"(notebooks/{name}.ipynb)" not in text] == []


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files(name):
    text = "\n".join(cell.source for cell in read(name).cells)
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text)
    assert links
    for link in links:
        assert (ROOT / "notebooks" / link).exists(), link


@pytest.mark.parametrize("name", NAMES)
def test_cells_that_name_the_repository_are_up_to_date(name):
    notebook, sources = read(name), [cell.source for cell in read(name).cells]
    make.link(notebook, name, make.repository())
    assert [cell.source for cell in notebook.cells] == sources
    assert "OWNER" not in "".join(sources)


@pytest.mark.parametrize("name", NAMES)
def test_a_badge_stands_there_if_the_repository_has_an_address(name):
    def text_of(notebook):
        return "\n".join(cell.source for cell in notebook.cells)

    notebook = read(name)
    make.link(notebook, name, "")
    without = text_of(notebook)
    assert "colab-badge" not in without and "github.com/" not in without
    assert "mim_jax.zip" in without
    make.link(notebook, name, URL)
    make.link(notebook, name, URL)  # once more changes nothing
    badge = (
        f"colab.research.google.com/github/someone/theirs/blob/main/notebooks/{name}"
    )
    assert text_of(notebook).count(f"{badge}.ipynb)") == 1
    assert notebook.cells[1].id == "badge"
    assert f"git clone -q {URL} repository" in text_of(notebook)
    assert "mim_jax.zip" not in text_of(notebook)
    nbformat.validate(notebook)
    make.link(notebook, name, "")
    assert text_of(notebook) == without


@pytest.mark.parametrize(
    ("urls", "expected"),
    [
        ({}, ""),
        ({"Documentation": "https://theirs.readthedocs.io"}, ""),
        ({"Docs": "https://a.org", "Source": URL}, URL),
        ({"Issues": f"{URL}/issues"}, URL),
        ({"Source": f"{URL}.git"}, URL),
    ],
)
def test_the_address_is_that_of_the_project(urls, expected):
    assert make.address(urls) == expected


def stored(*outputs):
    cell = nbformat.v4.new_code_cell("print()", id="one", outputs=list(outputs))
    cell.metadata["execution"] = {"iopub.status.busy": "2026-01-01T00:00:00Z"}
    return nbformat.v4.new_notebook(cells=[cell])


def stream(text, name="stdout"):
    return nbformat.v4.new_output("stream", text=text, name=name)


def test_what_differs_from_run_to_run_is_not_stored():
    line = "step 50/300  loss 0.9876  681 images/s  00:46 left\n"
    patience = stream("cka: 64 of 384 images\ncka: 128 of 384 images\n", "stderr")
    notebook = stored(stream(line), stream("done\n"), patience)
    make.tidy(notebook)
    (cell,) = notebook.cells
    assert cell.metadata == {}
    assert [one.text for one in cell.outputs] == ["step 50/300  loss 0.9876\ndone\n"]


@pytest.mark.parametrize(
    "output",
    [
        stream("UserWarning: careful", name="stderr"),
        stream("written to /tmp/tmpabc/runs\n"),
        stream("PosixPath('/home/me/runs')"),
        nbformat.v4.new_output("error", ename="ValueError", evalue="", traceback=[]),
    ],
)
def test_outputs_that_must_not_be_stored_are_refused(output):
    with pytest.raises(ValueError, match="cell 'one'"):
        make.tidy(stored(stream("fine: a/tmp/b, https://a.org/usr/x\n"), output))


# -- executed


def executed(name, tmp_path, values, **parameters):
    """(notebook, values of its variables after a run from top to bottom).

    Args:
        values: expressions that JSON can hold, evaluated at the end.
        parameters: set after the cell of that tag.
    """
    notebook = read(name)
    (place,) = [
        number
        for number, cell in enumerate(notebook.cells)
        if cell.metadata.get("tags") == ["parameters"]
    ]
    lines = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(lines))
    asked = f"import json\nprint(json.dumps([{', '.join(values)}]))"
    notebook.cells.append(nbformat.v4.new_code_cell(asked))
    # The kernel is a newcomer's: one device, no settings of these tests.
    environment = environments.newcomer(PYTHONPATH=str(ROOT), TMPDIR=str(tmp_path))
    where = {"metadata": {"path": str(ROOT / "notebooks")}}
    client = NotebookClient(notebook, timeout=900, resources=where)
    client.execute(env=environment)  # raises where a cell does
    last = notebook.cells.pop()
    outputs = outputs_of(notebook)
    noise = "".join(one.text for one in outputs if one.get("name") == "stderr")
    # On a busy machine an evaluation says that it is still at work.
    assert re.sub(r"^.+: \d+( of \d+)? images\n", "", noise, flags=re.M) == ""
    return notebook, json.loads(last.outputs[-1].text)


def check_quickstart(tmp_path, gain, **parameters):
    values = ("psnr", "accuracy", "bool((mask.hidden == again.hidden).all())")
    notebook, found = executed("quickstart", tmp_path, values, **parameters)
    psnr, accuracy, same = found
    pictures = pictures_of(notebook)
    assert len(pictures) == 5  # masks, loss, reconstructions of both models, CKA
    assert all(len(one) > 5000 for one in pictures)
    assert same
    assert psnr["model"] > psnr["untrained"] + gain
    kept, untrained = accuracy["1500 steps"], accuracy["untrained"]
    assert kept["neighbours"] > untrained["neighbours"] + 0.3
    assert kept["linear"] > max(0.8, untrained["linear"] + 0.1)
    return psnr


@pytest.mark.slow
@pytest.mark.every_change
def test_the_quickstart_runs_and_begins_to_learn(tmp_path):
    check_quickstart(tmp_path, gain=0.4, STEPS=40)


@pytest.mark.slow
def test_the_quickstart_learns_what_it_says(tmp_path):
    psnr = check_quickstart(tmp_path, gain=1.5)
    assert psnr["model"] > psnr["biharmonic"] + 0.5


@pytest.mark.slow
@pytest.mark.every_change
def test_a_published_checkpoint_is_the_same_network(tmp_path):
    values = "bool((one == other).all())", "float(right)", "sorted(os.listdir('runs'))"
    _, (same, right, runs) = executed("published_checkpoint", tmp_path, values)
    assert same
    assert right > 0.6
    assert runs == ["original", "published"]


@pytest.mark.slow
def test_a_checkpoint_of_ones_own_takes_the_place_of_the_small_one(tmp_path):
    from mim_jax import weights

    kept, run = ROOT / "notebooks/weights/mae-mnist.safetensors", tmp_path / "run"
    folder = tmp_path / "theirs"
    assert weights.main(["import", str(kept), str(run)]) == 0
    assert weights.main(["export", str(run), str(folder), "--format=hf"]) == 0
    values = "float(right)", "sorted(os.listdir('runs'))"
    parameters = dict(CHECKPOINT=str(folder))
    _, found = executed("published_checkpoint", tmp_path, values, **parameters)
    assert found[0] > 0.6 and found[1] == ["published"]


@pytest.mark.slow
def test_training_adds_most_at_the_root_of_the_hierarchy(tmp_path):
    values = "r2", "by_unit", "by_ratio"
    _, (r2, by_unit, by_ratio) = executed("masks_and_theory", tmp_path, values)
    root, tokens = r2["2"], r2["0"]
    untrained, pixels = root.pop("untrained"), root.pop("raw")
    assert len(root) == 2
    assert min(root.values()) > untrained + 0.1 > pixels + 0.1
    assert max(one for name, one in tokens.items() if "step" in name) < tokens["raw"]
    # Units that cover a subtree of level k put c at level k + 1 or above.
    for values in by_unit.values():
        for level, value in enumerate(values.values(), 1):
            assert value >= level
    assert (
        max(by_ratio["invertible"].values()) - min(by_ratio["invertible"].values())
        < 0.1
    )
    assert by_ratio["frontier"]["0.9"] > by_ratio["frontier"]["0.1"] + 0.2


@pytest.mark.slow
def test_an_objective_of_ones_own_learns(tmp_path):
    notebook, (rows,) = executed("own_objective", tmp_path, ["rows"])

    def found(title, start):
        (value,) = [one for run, one in rows[title].items() if run.startswith(start)]
        return value

    pixels, neighbours = "PSNR of hidden pixels, dB", "ten neighbours, accuracy"
    assert found(pixels, "simmim") > found(pixels, "random") + 1
    # SimMIM's features want more steps; those of MAE tell something by then.
    assert found(neighbours, "mae") > found(neighbours, "random") + 0.05
    (refused,) = [cell for cell in notebook.cells if cell.id == "wrong"]
    assert "unit" in refused.outputs[0].text


@pytest.mark.slow
def test_photographs_are_filled_in_and_told_apart(tmp_path):
    values = "psnr", "results", "accuracy", "len(training)", "len(held_out)"
    _, found = executed("own_photographs", tmp_path, values)
    psnr, results, accuracy, *counts = found
    assert counts == [290, 70]
    assert psnr["model"] > psnr["visible_mean"] + 0.5 > psnr["untrained"] + 5
    assert results["accuracy_model_k10"] > 0.2
    assert set(accuracy) == {"tuned", "scratch"}
    assert accuracy["tuned"] > 0.2  # a tenth by chance


@pytest.mark.slow
def test_a_folder_of_ones_own_needs_no_classes(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        pixels = rng.integers(0, 256, (60 + number, 80, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")
    values = "psnr", "accuracy", "len(training)"
    parameters = dict(FOLDER=str(folder), STEPS=10, TUNE_STEPS=5)
    _, found = executed("own_photographs", tmp_path, values, **parameters)
    assert found[1:] == [{}, 10]


@pytest.mark.slow
def test_features_of_mae_survive_occlusion(tmp_path):
    values = ['{f"{run}/{who}": one for (run, who), one in table.items()}', "chance"]
    _, (table, chance) = executed("occlusion", tmp_path, values)
    assert len(table) == 6
    (name,) = [
        key for key in table if key.startswith("mae,") and key.endswith("/model")
    ]
    trained, untrained = table[name], table[name.replace("/model", "/untrained")]
    retrieval, accuracy = 0, 2
    assert trained[retrieval] > untrained[retrieval] + 0.1
    assert trained[accuracy] > untrained[accuracy] + 0.2
    assert trained[retrieval] > 20 * chance
