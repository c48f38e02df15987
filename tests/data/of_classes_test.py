# SPDX-License-Identifier: Apache-2.0
"""Some classes of a source: which records, with which labels, found once."""

import dataclasses
import pickle
import re

import numpy as np
import pytest

from mim_jax.data.sources.base import Source
from mim_jax.data.sources.digits import Digits
from mim_jax.data.sources.few import Few
from mim_jax.data.sources.of_classes import OfClasses


@dataclasses.dataclass(frozen=True)
class Labels(Source):
    """Records whose image tells their position, with these labels."""

    given: tuple[int, ...]
    split: str = "train"
    classes: tuple[str, ...] = ("n01", "n02", "n03", "n04")  # pyright: ignore
    channels: int = 1  # pyright: ignore

    def __len__(self):
        return len(self.given)

    def __getitem__(self, index):
        image = np.full((1, 1, 1), index, np.uint8)
        return {"image": image, "label": self.given[index], "name": f"file{index}"}

    def held_out(self):
        return Labels((3, 0, 1), "held_out")

    def fingerprint(self):
        return {"name": "labels", "split": self.split, "count": len(self)}


WHOLE = Labels((0, 3, -1, 1, 3, 2, 0))
PICKED = OfClasses(source=WHOLE, names=("n04", "n01"))


def told(source):
    """Position in the whole set and label of each record."""
    records = [source[index] for index in range(len(source))]
    return [(int(one["image"].item()), one["label"]) for one in records]


def test_records_of_the_classes_in_order_with_labels_by_the_list():
    assert told(PICKED) == [(0, 1), (1, 0), (4, 0), (6, 1)]
    assert PICKED.labels().tolist() == [1, 0, 0, 1]
    assert PICKED[1]["name"] == "file1"  # what else a record has stays
    assert PICKED.classes == ("n04", "n01") and PICKED.channels == 1
    assert told(PICKED.held_out()) == [(0, 0), (1, 1)]


def test_a_class_list_is_a_file_with_a_name_on_each_line(tmp_path):
    path = tmp_path / "some.txt"
    path.write_text("# two of four\nn04 goldfish, Carassius auratus\n\n  n01\n")
    listed = OfClasses(source=WHOLE, file=str(path))
    assert listed.classes == PICKED.classes and told(listed) == told(PICKED)
    assert listed.fingerprint() == PICKED.fingerprint()
    other = OfClasses(source=WHOLE, names=("n01", "n04"))
    assert other.fingerprint() != PICKED.fingerprint()


def test_an_index_saves_reading_the_labels_again(tmp_path, monkeypatch):
    kept = OfClasses(source=WHOLE, names=PICKED.names, index=f"{tmp_path}/kept.npz")
    assert told(kept) == told(PICKED) and told(kept.held_out()) == [(0, 0), (1, 1)]
    # Only a run writes: somebody else's config may name any path, and is only read.
    assert not list(tmp_path.iterdir())
    few = Few(source=kept, images=2)
    few.keep()
    assert len(list(tmp_path.iterdir())) == 2  # one for each split, and no other
    monkeypatch.setattr(Labels, "labels", lambda self: pytest.fail("read again"))
    again = dataclasses.replace(kept)
    assert told(again) == told(PICKED) and len(again.held_out()) == 2
    # A worker gets the choice, and reads nothing to make it.
    assert told(pickle.loads(pickle.dumps(PICKED))) == told(PICKED)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({}, "names=(), file='': want the one or the other"),
        (dict(names=("n01", "n02"), file="x"), "want the one or the other"),
        (dict(file="/nowhere"), "file='/nowhere': "),
        (
            dict(names=("n01", "n09", "n08")),
            "names: 'n09' is no class of the source (2",
        ),
        (dict(names=("n01",)), "1 names, 1 different ones: want at least 2"),
        (dict(names=("n01", "n01")), "2 names, 1 different ones"),
        (dict(names=("n01", "n02"), index="kept"), "want a path that ends with .npz"),
    ],
)
def test_mistakes_are_told(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        OfClasses(source=WHOLE, **fields)


def test_classes_without_a_record_are_told():
    alone = OfClasses(source=Labels((0, 0)), names=("n03", "n04"))
    with pytest.raises(ValueError, match="no record of the source has one"):
        len(alone)


def test_digits_of_two_classes_are_those_of_the_file():
    labels = Digits().labels()
    some = OfClasses(source=Digits(), names=("7", "3"))
    assert len(some) == np.isin(labels, (3, 7)).sum() > 200
    assert np.array_equal(some.labels() == 0, labels[np.isin(labels, (3, 7))] == 7)
