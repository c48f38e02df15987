# SPDX-License-Identifier: Apache-2.0
"""A few images: chosen once, the same on any machine, by class if asked."""

import collections
import dataclasses
import json
import pathlib
import pickle

import numpy as np
import pytest

from mim_jax import config, train
from mim_jax.data.input import Input
from mim_jax.data.pipeline import train_batches
from mim_jax.data.sources.base import Source
from mim_jax.data.sources.digits import Digits
from mim_jax.data.sources.few import Few
from mim_jax.data.sources.folder import Folder
from mim_jax.data.sources.photos import Photos
from mim_jax.data.sources.tfds import Tfds
from mim_jax.plan import Plan
from mim_jax.run import rundir

JPEGS = pathlib.Path(__file__).parent / "jpegs"


@dataclasses.dataclass(frozen=True)
class Labels(Source):
    """Records with these labels and a blank image."""

    given: tuple[int, ...]
    name: str = "one"
    classes: tuple[str, ...] = tuple("abcdef")  # pyright: ignore
    channels: int = 3  # pyright: ignore

    def __len__(self):
        return len(self.given)

    def __getitem__(self, index):
        return {"image": np.zeros((2, 2, 3), np.uint8), "label": self.given[index]}

    def held_out(self):
        return Labels((0, 1))

    def fingerprint(self):
        return {"name": self.name, "count": len(self)}


# Class 0 has 5 images, 1 has 4, 2 has 3, 3 has 2, 4 has 1, 5 none; one is unlabelled.
STAIR = Labels((0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 4, -1))
DIGITS = Digits()


def labels_of(few):
    return [few[index]["label"] for index in range(len(few))]


def test_the_choice_is_the_same_on_any_machine():
    # Stored with numpy 2.4: the generator's bits are frozen.
    few = Few(source=DIGITS, images=5)
    assert few.chosen() == (839, 231, 1195, 766, 162)
    assert Few(source=DIGITS, images=5).chosen() == few.chosen()
    assert Few(source=DIGITS, images=5, seed=1).chosen() != few.chosen()
    renamed = dataclasses.replace(STAIR, name="other")
    one, other = (Few(source=s, images=9).chosen() for s in (STAIR, renamed))
    assert one != other


@pytest.mark.parametrize("sampling", ["random", "one_class", "one_per_class"])
def test_records_are_those_of_the_source(sampling):
    few = Few(source=DIGITS, images=10, sampling=sampling)
    ids = few.chosen()
    assert len(few) == len(ids) == len(set(ids)) == 10
    for index, place in enumerate(ids):
        record, want = few[index], DIGITS[place]
        np.testing.assert_array_equal(record["image"], want["image"])
        assert record["label"] == want["label"]
    assert few.classes == DIGITS.classes and few.channels == 1
    assert few.held_out() == DIGITS.held_out()
    # A smaller choice with the same seed is a part of this one.
    less = Few(source=DIGITS, images=4, sampling=sampling)
    assert less.chosen() == ids[:4]


def test_random_is_uniform_over_images():
    counts = np.zeros(16)
    for seed in range(1000):
        counts[list(Few(source=STAIR, images=4, seed=seed).chosen())] += 1
    # Each is chosen in one of four draws: 250 times, with a deviation of 13.7.
    assert counts.sum() == 4000 and np.abs(counts - 250).max() < 4 * 13.7


def test_one_class_is_uniform_over_classes_that_are_large_enough():
    found = collections.Counter()
    for seed in range(300):
        few = Few(source=STAIR, images=3, sampling="one_class", seed=seed)
        (label,) = set(labels_of(few))
        found[label] += 1
    assert set(found) == {0, 1, 2}
    assert max(abs(count - 100) for count in found.values()) < 4 * 8.2


def test_one_per_class():
    few = Few(source=STAIR, images=5, sampling="one_per_class")
    assert sorted(labels_of(few)) == [0, 1, 2, 3, 4]
    firsts = {
        Few(source=STAIR, images=5, sampling="one_per_class", seed=seed).chosen()
        for seed in range(20)
    }
    assert len(firsts) == 20  # not always the first image of a class
    pairs = [
        labels_of(Few(source=STAIR, images=2, sampling="one_per_class", seed=seed))
        for seed in range(40)
    ]
    assert all(a != b for a, b in pairs)
    assert {label for pair in pairs for label in pair} == {0, 1, 2, 3, 4}


def test_ids_override_all_else():
    few = Few(source=STAIR, images=99, sampling="one_per_class", ids=(14, 0, 3))
    assert len(few) == 3 and few.chosen() == (14, 0, 3)
    assert labels_of(few) == [4, 0, 0]
    # The same images are the same data, chosen by hand or drawn.
    drawn = Few(source=STAIR, images=3, seed=2)
    by_hand = Few(source=STAIR, ids=drawn.chosen())
    assert by_hand.fingerprint() == drawn.fingerprint()
    assert Few(source=STAIR, images=3, seed=1).fingerprint() != drawn.fingerprint()
    renamed = dataclasses.replace(STAIR, name="other")
    elsewhere = Few(source=renamed, ids=drawn.chosen())
    assert elsewhere.fingerprint() != by_hand.fingerprint()


def test_images_are_not_read_to_choose(monkeypatch, tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(4):
            (tmp_path / "train" / name / f"{i}.jpg").touch()
    for cls in (Digits, Folder, Photos, Tfds):
        monkeypatch.setattr(cls, "__getitem__", lambda *_: 1 / 0)
    for source in (DIGITS, Folder(path=str(tmp_path))):
        for sampling in ("random", "one_class", "one_per_class"):
            assert len(Few(source=source, images=3, sampling=sampling).chosen()) == 3
    tfds = Tfds(dataset="small_jpegs", data_dir=str(JPEGS))
    assert len(Few(source=tfds, images=3).chosen()) == 3
    assert Few(source=tfds, ids=(1,), sampling="one_class").chosen() == (1,)
    assert len(Few(source=Photos()).chosen()) == 1


def test_tfds_labels_are_read_once_and_travel_to_workers(monkeypatch):
    source = Tfds(dataset="small_jpegs", data_dir=str(JPEGS))
    few = Few(source=source, images=3, sampling="one_per_class")
    want = few.chosen()
    assert sorted(labels_of(few)) == [0, 1, 2]
    monkeypatch.setattr(Tfds, "__getitem__", lambda *_: 1 / 0)
    copy = pickle.loads(pickle.dumps(few))
    assert copy == few and copy.chosen() == want


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(images=0), "images=0: want at least 1"),
        (dict(images=17), "images=17: want 1 <= images <= 16, the number"),
        (dict(seed=-1), "seed=-1: want 0 <= seed"),
        (dict(ids=(3, 16)), r"ids=\(3, 16\): want 0 <= id < 16, the number"),
        (dict(ids=(-1,)), r"ids=\(-1,\): want at least 0"),
        (dict(ids=(3, 3)), r"ids=\(3, 3\): want each one once"),
        (
            dict(images=7, sampling="one_per_class"),
            "images=7, sampling='one_per_class': want at most 6 images, one of each",
        ),
        (
            dict(images=6, sampling="one_per_class"),
            "images=6, sampling='one_per_class': want at most 5, the classes that have",
        ),
        (
            dict(images=6, sampling="one_class"),
            "images=6, sampling='one_class': want at most 5, the images of the largest",
        ),
    ],
)
def test_errors_say_what_would_work(fields, message):
    with pytest.raises(ValueError, match=message):
        Few(source=STAIR, **fields).chosen()


@pytest.mark.parametrize("sampling", ["one_class", "one_per_class"])
def test_classes_need_labels(sampling):
    with pytest.raises(ValueError, match="without labels: want sampling='random', or"):
        Few(source=Photos(), sampling=sampling)


def test_one_image_is_cropped_anew_at_every_draw():
    data = Input(
        source=Few(source=DIGITS), image_size=(8, 8), crop_scale=(0.3, 0.9), workers=0
    )
    with train_batches(data, seed=0, batch_size=24, stop=2) as batches:
        batches = list(batches)
    assert [set(batch["index"].tolist()) for batch in batches] == [{0}, {0}]
    rows = np.concatenate([batch["image"] for batch in batches])
    assert len({row.tobytes() for row in rows}) > 40


# In a run.


def tree(**fields) -> config.Tree:
    c = config.experiment("train", source="few")
    digits = config.choose(Source, "digits")
    c.data.source = config.choose(Source, "few", source=digits, **fields)
    c.steps, c.batch_size, c.dtype, c.remat = 2, 8, "float32", "none"
    c.compile_cache = False
    c.objective.encoder.update(dict(patch=4, width=16, depth=1, heads=2))
    c.objective.decoder.update(dict(width=16, depth=1, heads=2))
    c.objective.update(dict(mean=(0.5,), std=(0.25,)))
    c.data.image_size, c.data.workers = (8, 8), 0
    return c


def test_a_config_nests_the_source(tmp_path):
    c = tree(images=3, sampling="one_class")
    assert config.build(c).data.source == Few(
        source=DIGITS, images=3, sampling="one_class"
    )
    c.data.source.ids = (4, 2)
    (tmp_path / "config.json").write_text(config.dumps(c))
    again = config.load(tmp_path / "config.json")
    assert config.build(again) == config.build(c) and not config.difference(again, c)
    config.check_path(c, "data.source.source.split")
    c.data.source.ids = ()
    c.data.source.images = 2000
    with pytest.raises(
        config.ConfigError, match=r"^config.data.source.images=2000: want 1 <= "
    ):
        config.build(c)


def test_labels_that_do_not_suffice_are_refused_before_a_run():
    # The largest class has 183, one in five held out.
    with pytest.raises(config.ConfigError, match="images=200.*want at most 147, the"):
        Plan.of(tree(images=200, sampling="one_class"))


class Left(Exception):
    pass


def test_the_run_directory_keeps_the_choice(tmp_path, monkeypatch, capfd):
    def leave(*_):
        raise Left

    monkeypatch.setattr(train.beginning, "begin", lambda *_: (0, None, {}))
    monkeypatch.setattr(train, "_train", leave)
    c = tree(images=4, sampling="one_per_class")
    with pytest.raises(Left):
        train.run(c, tmp_path)
    path = tmp_path / "images.json"
    ids = json.loads(path.read_text())["ids"]
    assert tuple(ids) == Plan.of(c).settings.data.source.chosen()
    assert len({DIGITS[index]["label"] for index in ids}) == 4
    written = path.read_bytes()
    rundir.write_images(tmp_path, tuple(ids))  # on resume
    assert path.read_bytes() == written and not capfd.readouterr().err


@pytest.mark.parametrize("there", ['{"ids": [1, 3]}', "no JSON", None])
def test_a_choice_that_somebody_changed_is_told_and_written_anew(
    tmp_path, there, capfd
):
    path = tmp_path / "images.json"
    path.write_text("[" * 100_000 if there is None else there)
    rundir.write_images(tmp_path, (1, 2))
    assert json.loads(path.read_text())["ids"] == [1, 2]
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"WARNING: {path} was changed")


def test_a_source_read_in_full_writes_no_file(tmp_path):
    assert DIGITS.chosen() is None
    rundir.write_images(tmp_path, DIGITS.chosen())
    assert not list(tmp_path.iterdir())


def test_the_embedded_config_learns_from_one_photograph():
    built = config.build(config.read("configs/few.py:photos"))
    few = built.data.source
    assert len(few) == 1 and few.source == Photos()
    (index,) = few.chosen()
    assert few.source.files[index] == "skimage/data/astronaut.png"
    assert built.epoch_images == 1_281_167 and built.objective.jitter.blur_p == 0.5


@pytest.mark.parametrize("images", range(1, 16))
def test_a_stratified_choice_has_each_class_in_proportion(images):
    few = Few(source=STAIR, images=images, sampling="stratified")
    labels = np.array(labels_of(few))
    assert len(few) == len(set(few.chosen())) == images and (labels >= 0).all()
    counts = np.bincount(labels, minlength=5)
    exact = np.array([5, 4, 3, 2, 1]) * images / 15
    assert (np.abs(counts - exact) < 1).all()
    if images % 15 == 0:
        assert counts.tolist() == [5, 4, 3, 2, 1]


def test_a_share_is_that_part_of_the_source():
    few = Few(source=DIGITS, share=0.1, sampling="stratified")
    assert len(few) == len(few.chosen()) == 144  # of 1442
    counts = np.bincount(labels_of(few), minlength=10)
    assert counts.min() >= 13 and counts.max() <= 15
    assert few.chosen() == Few(source=DIGITS, share=0.1, sampling="stratified").chosen()
    other = dataclasses.replace(few, seed=1)
    assert other.chosen() != few.chosen()
    assert len(Few(source=DIGITS, share=1.0)) == 1442
    for share in (0.0, 1.5, 1e-9):
        with pytest.raises(ValueError, match=f"share={share}: want (0|1/1442) <"):
            Few(source=DIGITS, share=share)
    with pytest.raises(ValueError, match="want at most 15, the images with a label"):
        Few(source=STAIR, images=16, sampling="stratified").chosen()
