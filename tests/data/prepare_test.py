# SPDX-License-Identifier: Apache-2.0
"""Preparing data: the message without TensorFlow, and the records made with it."""

import functools
import importlib.util
import pathlib
import subprocess
import sys

import pytest

from mim_jax.data import prepare
from mim_jax.data.sources.folder import Folder
from mim_jax.data.sources.tfds import Tfds

HERE = pathlib.Path(__file__).parent
has_tensorflow = importlib.util.find_spec("tensorflow") is not None
needs_tensorflow = pytest.mark.skipif(
    not has_tensorflow, reason="needs TensorFlow: pip install -e '.[prepare]'"
)


def make_jpegs():
    """The script beside this test, as a module."""
    spec = importlib.util.spec_from_file_location("make_jpegs", HERE / "make_jpegs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def records(source):
    return [source[i] for i in range(len(source))]


def record(calls, command, **options):
    calls.append((command, options))


def test_without_tensorflow_it_names_the_extra(monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    without = lambda name: None if name == "tensorflow" else find_spec(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)
    for command in (
        ["imagenet2012"],
        ["convert", "--from=a", "--to=b"],
        ["folder", "--path=a", "--name=b"],
    ):
        with pytest.raises(SystemExit) as stop:
            prepare.main(command)
        assert stop.value.code == 2
        assert "pip install -e '.[prepare]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "call"),
    [
        (
            ["imagenet2012", "--manual_dir=m"],
            ("dataset", dict(name="imagenet2012", data_dir=None, manual_dir="m")),
        ),
        (
            ["convert", "--from=a", "--to=b"],
            ("convert", dict(version_dir="a", data_dir="b")),
        ),
        (
            ["folder", "--path=a", "--name=b", "--data_dir=c"],
            ("folder", dict(path="a", name="b", data_dir="c", version="1.0.0")),
        ),
    ],
)
def test_command_line(monkeypatch, capsys, command, call):
    calls = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    for name in ("dataset", "convert", "folder"):
        monkeypatch.setattr(prepare, name, functools.partial(record, calls, name))
    prepare.main(command)
    assert calls == [call]


def test_convert_checks_its_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no dataset_info.json in"):
        prepare.convert(str(tmp_path), str(tmp_path))
    version = HERE / "jpegs" / "small_jpegs" / "1.0.0"
    with pytest.raises(ValueError, match="exists already: name another --to"):
        prepare.convert(str(version), str(HERE / "jpegs"))
    with pytest.raises(ValueError, match="holds no TFRecord files"):
        prepare.convert(str(version), str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.prepare
@needs_tensorflow
def test_committed_set_is_what_its_script_makes(tmp_path):
    make_jpegs().make(tmp_path / "new")
    fields = dict(dataset="small_jpegs", held_out_split="train")
    new = Tfds(data_dir=str(tmp_path / "new"), **fields)
    old = Tfds(data_dir=str(HERE / "jpegs"), **fields)
    assert new.classes == old.classes and len(new) == len(old) == 20
    assert [r["label"] for r in records(new)] == [r["label"] for r in records(old)]
    assert [r["image"] for r in records(new)] == [r["image"] for r in records(old)]


@pytest.mark.prepare
@needs_tensorflow
def test_folder_keeps_bytes_and_labels_of_both_splits(tmp_path):
    crops = tmp_path / "crops"
    make_jpegs().write_crops(crops)
    (crops / "val" / "nature").mkdir(parents=True)
    moved = crops / "train" / "nature" / "00.jpg"
    moved.rename(crops / "val" / "nature" / "00.jpg")
    prepare.main(
        ["folder", f"--path={crops}", "--name=crops_too", f"--data_dir={tmp_path}"]
    )
    source = Tfds(dataset="crops_too", data_dir=str(tmp_path))
    folder = Folder(path=str(crops))
    for got, want in ((source, folder), (source.held_out(), folder.held_out())):
        assert got.classes == want.classes and len(got) == len(want)
        pairs = [{(r["image"], r["label"]) for r in records(s)} for s in (got, want)]
        assert pairs[0] == pairs[1]


@pytest.mark.prepare
@needs_tensorflow
def test_convert_makes_tfrecords_readable(tmp_path):
    import tensorflow_datasets as tfds

    version = HERE / "jpegs" / "small_jpegs" / "1.0.0"
    source = Tfds(dataset="small_jpegs", data_dir=str(HERE / "jpegs"))
    builder = tfds.builder_from_directory(str(version))
    examples = [
        (i, {"image": r["image"], "label": r["label"]})
        for i, r in enumerate(records(source))
    ]
    tfds.dataset_builders.store_as_tfds_dataset(
        name="small_jpegs",
        version="1.0.0",
        data_dir=str(tmp_path / "old"),
        features=builder.info.features,
        split_datasets={"train": examples},
        file_format="tfrecord",
        disable_shuffling=True,
    )
    old = {"dataset": "small_jpegs", "data_dir": str(tmp_path / "old")}
    with pytest.raises(ValueError, match="holds tfrecord files") as error:
        Tfds(**old)
    # The command of the message, word for word but for the new folder.
    command = next(line for line in str(error.value).splitlines() if " -m " in line)
    command = command.replace("OTHER_DATA_DIR", str(tmp_path / "new")).split()
    subprocess.run([sys.executable, *command[1:]], check=True, cwd=HERE.parents[1])
    new = Tfds(dataset="small_jpegs", data_dir=str(tmp_path / "new"))
    assert records(new) == records(source)
