# SPDX-License-Identifier: Apache-2.0
"""Batches are a pure function of seed, step and row, and each record comes once."""

import dataclasses
import io
import itertools

import numpy as np
import pytest
from PIL import Image
from records import Numbered, assert_same, join

from mim_jax.data import transforms
from mim_jax.data.decoding import decode
from mim_jax.data.fields import DataError
from mim_jax.data.input import Input
from mim_jax.data.pipeline import (
    _order,
    eval_batches,
    identity,
    interleaved,
    train_batches,
)
from mim_jax.data.sources.digits import Digits
from mim_jax.data.sources.few import Few
from mim_jax.data.sources.folder import Folder
from mim_jax.data.sources.photos import Photos


def make(source=None, **fields):
    fields = {"image_size": (4, 4), "workers": 0, "threads": 2} | fields
    return Input(source=source or Numbered(), **fields)


def read(data, **options):
    with train_batches(data, **options) as batches:
        return join(batches)


# Few records and many have their orders from different code.
SOURCES = [Digits(), Few(source=Digits(), images=10)]


@pytest.fixture(scope="module", params=SOURCES, ids=["many", "few"])
def straight(request):
    """Steps 0 to 7 of twelve images each, read without workers."""
    data = Input(source=request.param, image_size=(12, 10), workers=0, threads=1)
    return data, read(data, seed=3, batch_size=12, stop=8)


def test_batch_has_what_it_says(straight):
    data, got = straight
    assert got["image"].shape == (96, 12, 10, 1) and got["image"].dtype == np.uint8
    for key in ("label", "index"):
        assert got[key].shape == (96,) and got[key].dtype == np.int32
    assert got["replaced"].dtype == np.bool_ and not got["replaced"].any()
    labels = [data.source[int(i)]["label"] for i in got["index"]]
    np.testing.assert_array_equal(got["label"], labels)
    assert got["image"].std() > 50


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_do_not_change_a_byte(straight, workers):
    data, want = straight
    data = dataclasses.replace(data, workers=workers)
    assert_same(read(data, seed=3, batch_size=12, stop=8), want)


def test_threads_and_prefetch_do_not_change_a_byte(straight):
    data, want = straight
    data = dataclasses.replace(data, threads=5, prefetch=4)
    assert_same(read(data, seed=3, batch_size=12, stop=8), want)


@pytest.mark.parametrize(("start", "workers"), [(1, 0), (5, 0), (3, 2), (8, 0)])
def test_a_run_can_start_at_any_step(straight, start, workers):
    data, want = straight
    data = dataclasses.replace(data, workers=workers)
    later = train_batches(data, seed=3, batch_size=12, start=start, stop=9)
    with later:
        got = join(later)
    rows = slice(start * 12, 96)
    for key in want:
        np.testing.assert_array_equal(got[key][: 96 - start * 12], want[key][rows])


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_read_the_rows_of_one_host(straight, hosts):
    data, want = straight
    parts = [
        read(data, seed=3, batch_size=12, stop=8, host=host, hosts=hosts)
        for host in range(hosts)
    ]
    for key in want:
        rows = [part[key].reshape(8, 12 // hosts, -1) for part in parts]
        got = np.concatenate(rows, axis=1)
        np.testing.assert_array_equal(got, want[key].reshape(8, 12, -1))


def test_a_host_may_read_any_rows(straight):
    data, want = straight
    places = [1, 2, 7, 11]
    got = read(data, seed=3, batch_size=12, stop=8, places=places)
    for key in want:
        rows = want[key].reshape(8, 12, -1)[:, places]
        np.testing.assert_array_equal(got[key].reshape(8, 4, -1), rows)


def test_seeds_differ_and_repeat(straight):
    data, want = straight
    assert_same(read(data, seed=3, batch_size=12, stop=8), want)
    other = read(data, seed=4, batch_size=12, stop=8)
    assert (other["index"] != want["index"]).mean() > 0.9


@pytest.mark.parametrize("count", [1, 10, 1000, 1001])
def test_every_record_once_an_epoch_in_a_new_order(count):
    order = _order(count, seed=0)
    epochs = np.reshape([order[place] for place in range(9 * count)], (9, count))
    for epoch in epochs:
        assert sorted(epoch) == list(range(count))
    assert count == 1 or len({tuple(epoch) for epoch in epochs}) > 5
    other = [_order(count, seed=1)[place] for place in range(count)]
    assert count == 1 or other != epochs[0].tolist()


def test_a_batch_may_span_two_epochs():
    index = read(make(), seed=0, batch_size=4, stop=25)["index"]
    assert index.tolist() == [_order(10, seed=0)[place] for place in range(100)]


def test_each_order_of_few_records_is_as_likely_as_any_other():
    """All six orders of three records, in 3,000 epochs: chi-square with five degrees
    of freedom is below 20.5 with probability .999."""
    order = _order(3, seed=5)
    drawn = np.reshape([order[place] for place in range(9000)], (3000, 3))
    _, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(counts) == 6
    assert ((counts - 500.0) ** 2 / 500).sum() < 20.5


def test_the_order_of_few_records_stays_what_it_was():
    """A run that goes on with a later version, or a later NumPy, reads the same."""
    assert [_order(5, seed=7)[place] for place in range(5, 10)] == [1, 3, 2, 4, 0]


def test_a_checkpoint_tells_the_orders_of_few_records_apart():
    few, many = Numbered(count=1000), Numbered(count=1001)
    assert identity(few) == {"name": "numbered", "order": "permutation"}
    assert identity(many) == {"name": "numbered"}


def test_an_image_is_cropped_anew_each_epoch():
    got = read(make(Digits()), seed=0, batch_size=1438, stop=2)
    first, second = got["image"][:1438], got["image"][1438:]
    first = first[np.argsort(got["index"][:1438])]
    second = second[np.argsort(got["index"][1438:])]
    assert (first != second).any(axis=(1, 2, 3)).mean() > 0.9


def test_augmentation_is_the_transforms_with_the_fields():
    colour = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)

    class One(Numbered):
        channels = 3

        def __getitem__(self, index):
            return {"image": colour, "label": 0}

    whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (0.75, 0.75)}
    data = make(One(count=1), image_size=(8, 6), **whole)
    want = transforms.resize(colour, (8, 6))
    images = read(data, seed=0, batch_size=20, stop=1)["image"]
    same = (images == want).all(axis=(1, 2, 3))
    mirrored = (images == want[:, ::-1]).all(axis=(1, 2, 3))
    assert (same | mirrored).all() and same.any() and mirrored.any()
    plain = dataclasses.replace(data, flip=False)
    images = read(plain, seed=0, batch_size=20, stop=1)["image"]
    assert (images == want).all()
    small = dataclasses.replace(plain, crop_scale=(0.1, 0.1))
    assert (read(small, seed=0, batch_size=20, stop=1)["image"] != want).any()


# Two crops, and local ones.


def test_crops_of_jpegs_are_the_recipes(tmp_path):
    """Against Pillow, which decodes the whole image, cuts and shrinks it: a few levels
    apart where our decoder decodes an image to a part of its size."""
    (tmp_path / "train").mkdir()
    factors = {1: (375, 500), 2: (760, 900), 4: (1500, 1700)}
    for factor, (rows, cols) in factors.items():
        photograph = Image.fromarray(Photos()[11]["image"]).resize((cols, rows))
        photograph.save(tmp_path / "train" / f"{factor}.jpg", quality=90)
    source = Folder(path=str(tmp_path), held_out_folder="train")
    data = make(source, image_size=(112, 112), flip=False)
    for index, (factor, (rows, cols)) in enumerate(factors.items()):
        encoded = source[index]["image"]
        picture = Image.open(io.BytesIO(encoded)).convert("RGB")
        shape = decode(encoded, 3, data.suffices).shape[:2]
        assert shape == (rows // factor, cols // factor)
        for seed in range(8):
            rng = np.random.default_rng(seed)
            got = data.examples.train(source[index], data, rng)["image"]
            rng = np.random.default_rng(seed)
            box = transforms.sample_box(
                (rows, cols), data.crop_scale, data.crop_ratio, rng
            )
            rng = np.random.default_rng(seed)
            small = transforms.sample_box(shape, data.crop_scale, data.crop_ratio, rng)
            # The same box, to a pixel of the smaller image.
            np.testing.assert_allclose(small, np.array(box) / factor, atol=1)
            assert min(small[2:]) >= 112
            top, left, height, width = factor * np.array(small)
            cut = picture.crop((left, top, left + width, top + height))
            want = np.asarray(cut.resize((112, 112), Image.Resampling.BICUBIC), int)
            limit = 0.3 if factor == 1 else 3
            assert np.abs(got - want).mean() < limit, (factor, seed)


def test_a_second_crop_leaves_the_first_as_it_was(straight):
    data, want = straight
    got = read(dataclasses.replace(data, crops=2), seed=3, batch_size=12, stop=8)
    second = got.pop("image2")
    assert_same(got, want)
    assert second.shape == want["image"].shape and second.dtype == np.uint8
    assert (second != want["image"]).any(axis=(1, 2, 3)).mean() > 0.9


def test_all_crops_are_of_the_same_record():
    data = make(Numbered(count=20, bad=(3,)), crops=2, local_crops=2, local_size=(2, 3))
    got = read(data, seed=0, batch_size=10, stop=4)
    for name in ("image2", "local"):
        values = got[name].reshape(40, -1)
        assert (values == got["image"][:, 0, 0]).all(), name
    assert got["replaced"].sum() == 2


def test_local_crops_have_their_own_size_and_scale():
    colour = np.random.default_rng(0).integers(0, 256, (40, 40, 1), dtype=np.uint8)

    class One(Numbered):
        def __getitem__(self, index):
            return {"image": colour, "label": 0}

    fields = dict(local_crops=3, local_size=(6, 5), flip=False)
    whole = dict(crop_ratio=(1.0, 1.0), local_scale=(1.0, 1.0))
    data = make(One(count=1), **fields, **whole)
    got = read(data, seed=0, batch_size=8, stop=1)["local"]
    assert got.shape == (8, 3, 6, 5, 1) and got.dtype == np.uint8
    assert (got == transforms.resize(colour, (6, 5))).all()
    small = dataclasses.replace(data, local_scale=(0.05, 0.1))
    got = read(small, seed=0, batch_size=8, stop=1)["local"].reshape(24, -1)
    assert len(np.unique(got, axis=0)) == 24  # each is another crop
    flipped = dataclasses.replace(data, flip=True)
    got = read(flipped, seed=0, batch_size=8, stop=1)["local"].reshape(24, -1)
    assert len(np.unique(got, axis=0)) == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_crops_are_the_same_in_any_process(workers):
    fields = dict(crops=2, local_crops=2, local_size=(4, 4), image_size=(6, 6))
    plain = make(Digits(), **fields)
    want = read(plain, seed=3, batch_size=12, stop=6)
    other = dataclasses.replace(plain, workers=workers, threads=3)
    assert_same(read(other, seed=3, batch_size=12, stop=6), want)
    # Crops depend neither on where a run starts nor on how many there are.
    fewer = dataclasses.replace(plain, local_crops=1)
    with train_batches(fewer, seed=3, batch_size=12, start=4, stop=6) as rest:
        got = join(rest)
    np.testing.assert_array_equal(got["local"], want["local"][48:, :1])
    np.testing.assert_array_equal(got["image2"], want["image2"][48:])


def test_evaluations_read_one_crop():
    data = make(Numbered(), crops=2, local_crops=2, local_size=(2, 2))
    with eval_batches(data, batch_size=5) as batches:
        got = join(batches)
    with eval_batches(make(Numbered()), batch_size=5) as batches:
        assert_same(got, join(batches))


def test_bad_records_are_replaced_the_same_way_each_time():
    data = make(Numbered(count=20, bad=(3, 11)))
    got = read(data, seed=0, batch_size=5, stop=8)
    again = read(data, seed=1, batch_size=8, stop=5)
    assert sorted(got["index"]) == sorted(list(range(20)) * 2)  # those asked for
    np.testing.assert_array_equal(got["replaced"], np.isin(got["index"], (3, 11)))
    shown = {}
    for batch in (got, again):
        rows = zip(batch["index"], batch["image"], batch["label"], strict=True)
        for index, image, label in rows:
            value = int(image.max())  # the number of the record shown
            assert shown.setdefault(int(index), value) == value
            assert label == value % 3  # the label belongs to the record shown
    assert all(shown[i] == i for i in range(20) if i not in (3, 11))
    assert not {shown[3], shown[11]} & {3, 11}


def test_a_corrupt_file_is_replaced_in_a_worker_too(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    for i in range(6):
        Image.new("RGB", (9, 9), (40 * i, 0, 0)).save(folder / f"{i}.jpg")
    (folder / "2.jpg").write_bytes((folder / "2.jpg").read_bytes()[:200])
    data = make(Folder(path=str(tmp_path), held_out_folder="train"))
    want = read(data, seed=0, batch_size=6, stop=4)
    np.testing.assert_array_equal(want["replaced"], want["index"] == 2)
    workers = dataclasses.replace(data, workers=2)
    assert_same(read(workers, seed=0, batch_size=6, stop=4), want)


def test_nothing_but_bad_records_is_an_error_that_names_them():
    data = make(Numbered(count=3, bad=(0, 1, 2)))
    expected = (
        r"Numbered\[\d\] \(.* cannot be read, and none of 20 records in its place"
    )
    with pytest.raises(DataError, match=expected):
        read(data, seed=0, batch_size=3, stop=1)


def test_our_own_mistakes_are_not_taken_for_bad_data():
    class Broken(Numbered):
        def __getitem__(self, index):
            return {"image": np.zeros((4, 4, 2), np.uint8), "label": 0}

    with pytest.raises(ValueError, match="2 channels: cannot make 1"):
        read(make(Broken()), seed=0, batch_size=3, stop=1)


@pytest.mark.parametrize("hosts", [1, 3, 8])
@pytest.mark.parametrize("batch_size", [24, 48])
@pytest.mark.parametrize("count", [1, 10, 24, 49])
def test_eval_gives_each_record_once(hosts, batch_size, count):
    source = Numbered(count=count)
    parts = []
    for host in range(hosts):
        batches = eval_batches(
            make(), batch_size=batch_size, host=host, hosts=hosts, source=source
        )
        with batches:
            parts.append(list(batches))
    assert len({len(part) for part in parts}) == 1  # hosts stay in step
    whole = join(itertools.chain(*zip(*parts, strict=True)))
    valid = whole["valid"]
    assert valid.dtype == np.bool_ and len(valid) % batch_size == 0
    assert len(valid) - count < batch_size
    np.testing.assert_array_equal(whole["index"][valid], np.arange(count))  # in order
    np.testing.assert_array_equal(whole["label"][valid], np.arange(count) % 3)
    np.testing.assert_array_equal(whole["image"][valid].max((1, 2, 3)), range(count))
    assert not whole["image"][~valid].any() and not whole["replaced"].any()
    assert (whole["index"][~valid] == -1).all() and (whole["label"][~valid] == -1).all()


def test_batches_know_how_many_are_left():
    with eval_batches(make(), batch_size=2) as batches:
        assert [(len(batches), bool(next(batches))) for _ in range(3)] == [
            (left, True) for left in (3, 2, 1)
        ]
        assert len(batches) == 0
    with train_batches(make(), seed=0, batch_size=2, start=3, stop=5) as two:
        assert len(two) == 2


def test_eval_reads_the_held_out_split_through_the_centre_crop():
    data = make(Digits(), image_size=(6, 6), eval_crop_fraction=0.9)
    with eval_batches(data, batch_size=100) as batches:
        got = join(batches)
    source = Digits().held_out()
    assert got["valid"].sum() == len(source)
    for index in (0, 100, len(source) - 1):
        want = transforms.centre_crop(source[index]["image"], (6, 6), 0.9)
        np.testing.assert_array_equal(got["image"][index], want)
    workers = dataclasses.replace(data, workers=1)
    with eval_batches(workers, batch_size=100) as batches:
        assert_same(join(batches), got)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sorted(Numbered):
    """Four, three, two and one images of four classes, one class after the other."""

    def __getitem__(self, index):
        return super().__getitem__(index) | {"label": int(self.labels()[index])}

    def labels(self):
        return np.repeat(np.arange(4, dtype=np.int32), (4, 3, 2, 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixed(Sorted):
    """The same images, one class in turn."""

    def labels(self):
        return np.array([0, 1, 2, 3, 0, 1, 2, 0, 1, 0], np.int32)


class Unknown(Numbered):
    """Its labels cost a read of every record."""

    def __getitem__(self, index):
        return super().__getitem__(index) | {"label": index // 5}


def test_a_spread_pass_gives_every_class_its_turn():
    def order(source, spread=True):
        data = make(threads=1)
        with eval_batches(data, batch_size=4, source=source, spread=spread) as batches:
            got = join(batches)
        valid = got["valid"]
        assert valid.tolist() == [True] * 10 + [False] * 2
        # The image and its label came along.
        labels = [source[i]["label"] for i in got["index"][valid]]
        assert got["label"][valid].tolist() == labels
        assert (
            got["image"][valid].max((1, 2, 3)).tolist() == got["index"][valid].tolist()
        )
        return got["index"][valid].tolist(), labels

    indices, labels = order(Sorted())
    assert sorted(indices) == list(range(10))
    # Rounds of four, three, two and one class, each with its next image.
    rounds = [labels[:4], labels[4:7], labels[7:9], labels[9:]]
    assert [sorted(part) for part in rounds] == [[0, 1, 2, 3], [0, 1, 2], [0, 1], [0]]
    for label in range(4):
        own = [i for i, found in zip(indices, labels, strict=True) if found == label]
        assert own == sorted(own)
    assert labels[:2] == [0, 2]  # far apart come first
    for source, spread in ((Sorted(), False), (Mixed(), True), (Unknown(), True)):
        assert order(source, spread)[0] == list(range(10))


@pytest.mark.parametrize("classes, each", [(10, 100), (1000, 3), (1, 7), (2, 1)])
def test_every_beginning_has_the_classes_alike(classes, each):
    labels = np.repeat(np.arange(classes), each)
    order = interleaved(labels)
    assert sorted(order) == list(range(classes * each))
    for count in (1, 8, classes, 64, 3 * classes + 1):
        found = np.bincount(labels[order[:count]], minlength=classes)
        assert found.max() - found.min() <= 1
    # Eight of a thousand classes: none of their gaps is twice another's.
    if classes == 1000:
        gaps = np.diff(np.sort(labels[order[:8]]))
        assert gaps.min() > 100 and gaps.max() < 150


def test_eval_leaves_bad_records_out():
    source = Numbered(count=6, bad=(4,))
    with eval_batches(make(), batch_size=4, source=source) as batches:
        got = join(batches)
    assert got["index"].tolist() == [0, 1, 2, 3, 4, 5, -1, -1]
    assert got["valid"].tolist() == [True] * 4 + [False, True, False, False]
    assert got["replaced"].tolist() == [False] * 4 + [True] + [False] * 3
    assert not got["image"][4].any() and got["label"][4] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hosts": 3}, "batch_size=4: want a multiple of the 3 hosts"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"host": 2, "hosts": 2}, "host=2: want 0 <= host < hosts=2"),
        ({"seed": -1}, "seed=-1: want 0 <= seed"),
        ({"start": 5, "stop": 4}, "start=5, stop=4"),
    ],
)
def test_train_batches_checks_its_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        train_batches(make(), **({"seed": 0, "batch_size": 4} | options))
