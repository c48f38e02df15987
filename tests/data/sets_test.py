# SPDX-License-Identifier: Apache-2.0
"""Evaluation sets: class maps by counts, layouts of folders, and shifts of digits."""

import dataclasses
import json
import pathlib
import pickle

import numpy as np
import prepared
import pytest
import tensorflow_datasets
from scipy import stats
from sklearn.linear_model import LogisticRegression

from mim_jax import presets
from mim_jax.data.input import Input
from mim_jax.data.passes import EvalPasses
from mim_jax.data.sets import SETS, conflicts, imagenet, objectnet
from mim_jax.data.sets.shifts import ROTATED, shifted
from mim_jax.data.sources.cues import Cues
from mim_jax.data.sources.digits import Digits
from mim_jax.data.sources.few import Few
from mim_jax.data.sources.mnist import Mnist
from mim_jax.data.sources.photos import Photos
from mim_jax.data.sources.tfds import Tfds

WNIDS = imagenet.facts()["wnids"]
DIGITS = Digits()
EMBEDDED = ("cues", *presets.SHIFTS["digits"], *presets.SHIFTS["mnist"])


def passes(source=DIGITS, batch_size=64):
    data = Input(
        source=source, image_size=(8, 8), eval_crop_fraction=1.0, workers=0, threads=1
    )
    return EvalPasses(data, batch_size)


def find(entry, source=DIGITS):
    return passes(source).evaluation_set(entry).images


def save(path, value=0, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(prepared.encoded(value, size))


def whole(found):
    """Every row of a pass, with those that fill the last batch."""
    with found.batches() as batches:
        parts = [{name: np.array(x) for name, x in batch.items()} for batch in batches]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def test_lists_of_classes_by_their_counts():
    facts = imagenet.facts()
    assert facts.keys() == {"wnids", "imagenet_a", "imagenet_r"}
    assert len(set(WNIDS)) == 1000 and list(WNIDS) == sorted(WNIDS)
    home = pathlib.Path(tensorflow_datasets.__file__).parent
    labels = home / "datasets" / "imagenet2012" / "labels.txt"
    assert labels.read_text().split() == list(WNIDS)
    for name in ("imagenet_a", "imagenet_r"):
        assert len(set(facts[name])) == 200 and list(facts[name]) == sorted(facts[name])
        assert 0 <= min(facts[name]) and max(facts[name]) < 1000
    # Goldfish are in R alone, robins in A alone, bald eagles in both.
    three = [WNIDS.index(wnid) for wnid in ("n01443537", "n01558993", "n01614925")]
    assert [one in facts["imagenet_r"] for one in three] == [True, False, True]
    assert [one in facts["imagenet_a"] for one in three] == [False, True, True]


@pytest.mark.oracle
def test_lists_of_classes_are_those_of_timm():
    import timm

    home = pathlib.Path(timm.__file__).parent / "data" / "_info"
    assert (home / "imagenet_synsets.txt").read_text().split() == list(WNIDS)
    for name in ("imagenet_a", "imagenet_r"):
        indices = (home / f"{name}_indices.txt").read_text().split()
        assert tuple(map(int, indices)) == imagenet.facts()[name]


def test_categories_by_their_counts():
    counts = {
        name: len(some)
        for name, some in zip(conflicts.CATEGORIES, conflicts.members(), strict=True)
    }
    assert counts == dict(
        airplane=1,
        bear=4,
        bicycle=2,
        bird=49,
        boat=5,
        bottle=7,
        car=3,
        cat=6,
        chair=4,
        clock=3,
        dog=109,
        elephant=2,
        keyboard=2,
        knife=1,
        oven=1,
        truck=8,
    )
    every = [label for some in conflicts.members() for label in some]
    assert len(set(every)) == len(every) == 207
    # One class of each category by its WordNet id, independent of the labels.
    for name, wnid in dict(
        airplane="n02690373",
        bear="n02134084",
        bicycle="n02835271",
        bird="n01614925",
        boat="n02951358",
        bottle="n02823428",
        car="n02814533",
        cat="n02123045",
        chair="n02791124",
        clock="n02708093",
        dog="n02085782",
        elephant="n02504458",
        keyboard="n03085013",
        knife="n03041632",
        oven="n04111531",
        truck="n03345487",
    ).items():
        place = tuple(conflicts.CATEGORIES).index(name)
        assert WNIDS.index(wnid) in conflicts.members()[place], name


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_sets_keep_the_contract(name):
    found = find(name)
    assert len(found) > 0 and len(found.classes) == len(found.members)
    assert 0 <= min(map(min, found.members))
    assert max(map(max, found.members)) < found.model_classes
    for index in (0, len(found) - 1):
        one, again = found[index], found[index]
        np.testing.assert_array_equal(one["image"], again["image"])
        assert one["image"].dtype == np.uint8 and one["labels"] == again["labels"]
        assert 1 <= len(one["labels"]) <= found.labels
        assert all(0 <= label < len(found.classes) for label in one["labels"])
    # A worker gets the same image.
    found = pickle.loads(pickle.dumps(found))
    np.testing.assert_array_equal(found[0]["image"], find(name)[0]["image"])
    with pytest.raises(ValueError, match=f"the program makes {name} itself"):
        find(f"{name}=/data")


def test_every_set_has_a_test_here():
    folders = {"imagenet_v2", "imagenet_r", "imagenet_a", "imagenet_sketch"}
    folders |= {"imagenet_real", "objectnet", "cue_conflict"}
    assert set(SETS) == folders | set(EMBEDDED)
    with pytest.raises(ValueError, match="set 'imagenet_q' is unknown; known: cue_con"):
        find("imagenet_q")


# ImageNet's variants.


def test_v2_folders_are_numbers(tmp_path):
    for label in range(1000):
        save(tmp_path / str(label) / "a.png", value=label % 256)
    found = find(f"imagenet_v2={tmp_path}")
    assert len(found) == 1000 and found.classes == WNIDS
    for index in (0, 2, 10, 100, 999):  # as text, 10 and 100 come before 2
        record = found[index]
        assert record["image"] == prepared.encoded(index % 256)
        (label,) = record["labels"]
        assert found.members[label] == (index,)


@pytest.mark.parametrize("name", ["imagenet_r", "imagenet_a", "imagenet_sketch"])
def test_folders_of_wordnet_ids(name, tmp_path):
    facts = imagenet.facts()
    chosen = facts[name] if name in facts else tuple(range(1000))
    for place, label in enumerate(chosen):
        save(tmp_path / WNIDS[label] / "b.png", value=place % 256)
    (tmp_path / "README.txt").write_text("no class")
    found = find(f"{name}={tmp_path}")
    assert len(found) == len(found.classes) == (1000 if "sketch" in name else 200)
    assert found.members == tuple((label,) for label in chosen)
    record = found[150]
    assert record["image"] == prepared.encoded(150) and record["labels"] == (150,)
    assert found.classes[150] == WNIDS[chosen[150]]

    (tmp_path / WNIDS[chosen[3]] / "b.png").unlink()
    (tmp_path / WNIDS[chosen[3]]).rmdir()
    count = len(chosen)
    want = f"has {count - 1} class folders, want its {count} classes; missing: "
    with pytest.raises(ValueError, match=want + WNIDS[chosen[3]]):
        find(f"{name}={tmp_path}")
    save(tmp_path / "n99999999" / "b.png")
    with pytest.raises(ValueError, match=f"has {count} .*unknown: n99999999"):
        find(f"{name}={tmp_path}")


def test_prepared_sets_lie_beside_the_runs_own(tmp_path):
    chosen = imagenet.facts()["imagenet_r"]
    labels = [chosen[7], 0, chosen[199]]  # R does not have label 0
    records = [
        dict(image=prepared.encoded(place), label=label)
        for place, label in enumerate(labels)
    ]
    prepared.write(tmp_path, "imagenet_r", "test", WNIDS, records)
    prepared.write(
        tmp_path, "mine", "train", ("a",), [dict(image=prepared.encoded(0), label=0)]
    )
    own = Tfds(dataset="mine", data_dir=str(tmp_path), held_out_split="train")
    for source in (own, Few(source=own, images=1)):
        found = find("imagenet_r", source)
        assert [found[i]["labels"] for i in range(3)] == [(7,), (), (199,)]
        assert found[0]["image"] == records[0]["image"]
        assert found.classes[7] == WNIDS[chosen[7]] and found.model_classes == 1000
        pickle.loads(pickle.dumps(found))[0]
    with pytest.raises(ValueError, match="'imagenet_v2=FOLDER': docs/data.md"):
        find("imagenet_v2", own)
    prepared.write(tmp_path, "imagenet_a", "test", WNIDS[::-1], records)
    with pytest.raises(ValueError, match="1000 classes that are not ImageNet's"):
        find("imagenet_a", own)


def test_v2_as_tfds_has_it(tmp_path):
    records = [dict(image=prepared.encoded(5), label=417)]
    prepared.write(tmp_path, "imagenet_v2/matched-frequency", "test", WNIDS, records)
    own = Few(source=Digits(), images=1)
    with pytest.raises(ValueError, match="mim_jax.data.prepare imagenet_v2/matched"):
        find("imagenet_v2", own)
    own = Tfds(
        dataset="imagenet_v2/matched-frequency",
        split="test",
        held_out_split="test",
        data_dir=str(tmp_path),
    )
    assert find("imagenet_v2", own)[0]["labels"] == (417,)


REAL = [[5, 970], [], [3]]


def test_real_labels_from_a_folder(tmp_path):
    (tmp_path / "real.json").write_text(json.dumps(REAL))
    for number, folder in ((1, "n02099601"), (2, "."), (3, "n01440764")):
        save(tmp_path / folder / f"ILSVRC2012_val_{number:08d}.png", value=number)
    with pytest.raises(ValueError, match="missing: ILSVRC2012_val_00000001.JPEG"):
        find(f"imagenet_real={tmp_path}")
    for path in list(tmp_path.rglob("*.png")):
        path.rename(path.with_suffix(".JPEG"))
    found = find(f"imagenet_real={tmp_path}")
    assert [found[i]["labels"] for i in range(3)] == [(5, 970), (), (3,)]
    assert [found[i]["image"] for i in range(3)] == [
        prepared.encoded(number) for number in (1, 2, 3)
    ]
    rows = whole(passes(batch_size=2).evaluation_set(f"imagenet_real={tmp_path}"))
    assert rows["labels"].shape == (4, 9)
    assert rows["labels"][0].tolist() == [5, 970] + [-1] * 7
    save(tmp_path / "more.JPEG")
    with pytest.raises(ValueError, match="has 4 images and real.json has labels for 3"):
        find(f"imagenet_real={tmp_path}")
    (tmp_path / "real.json").unlink()
    with pytest.raises(ValueError, match="no real.json in"):
        find(f"imagenet_real={tmp_path}")


def test_real_labels_as_tfds_has_them(tmp_path):
    records = [
        dict(image=prepared.encoded(place), original_label=0, real_label=labels)
        for place, labels in enumerate(REAL)
    ]
    prepared.write(tmp_path, "imagenet2012_real", "validation", WNIDS, records)
    own = Tfds(dataset="imagenet2012_real", split="validation", data_dir=str(tmp_path))
    found = find("imagenet_real", own)
    assert [found[i]["labels"] for i in range(3)] == [(5, 970), (), (3,)]


# ObjectNet.


def write_objectnet(home, first=0, shared=113):
    """A copy of the download's form: 313 classes, of which some are of ImageNet.

    ImageNet's label l is line (l * 7 + 3) % 1000 of the list of 2012. ObjectNet's class
    i is ImageNet's label i, the first one also label 500.
    """
    line_of = {label: (label * 7 + 3) % 1000 for label in range(1000)}
    lines = [""] * 1000
    for label, line in line_of.items():
        lines[line] = f"thing {label}, item {label}"
    lines[line_of[999]] = lines[line_of[998]]  # two classes with the same name
    names = [f"folder_{i:03d}" for i in range(313)]
    texts = {f"Class {i}": f"thing {i}, item {i}" for i in range(shared)}
    texts["Class 0"] += "; thing 500, item 500"
    mappings = home / "mappings"
    mappings.mkdir(parents=True)
    for name, value in {
        "folder_to_objectnet_label.json": {
            name: f"Class {i}" for i, name in enumerate(names)
        },
        "objectnet_to_imagenet_1k.json": texts,
        "pytorch_to_imagenet_2012_id.json": {
            str(label): line + first for label, line in line_of.items()
        },
    }.items():
        (mappings / name).write_text(json.dumps(value))
    (mappings / "imagenet_to_label_2012_v2").write_text("\n".join(lines) + "\n")
    for i, name in enumerate(names):
        save(home / "images" / name / "x.png", value=i % 256, size=(10, 10))
    return home


@pytest.mark.parametrize("first", [0, 1])
def test_objectnets_own_map(first, tmp_path):
    home = write_objectnet(tmp_path, first)
    found = find(f"objectnet={home}")
    assert len(found) == len(found.classes) == 113
    assert found.members[0] == (0, 500)
    assert found.members[1:] == tuple((label,) for label in range(1, 113))
    record = found[20]
    assert record["labels"] == (20,) and found.classes[20] == "folder_020"
    assert record["image"] == prepared.encoded(20, (10, 10))


def test_the_red_frame_is_cut_off(tmp_path):
    home = write_objectnet(tmp_path)
    pixels = np.zeros((12, 12, 3), np.uint8)
    pixels[2:-2, 2:-2] = 200
    pixels[..., 0] = np.where(pixels[..., 0] == 0, 255, 200)
    path = home / "images" / "folder_000" / "x.png"
    prepared.Image.fromarray(pixels).save(path)
    rows = whole(passes().evaluation_set(f"objectnet={home}"))
    assert rows["image"].shape == (128, 8, 8, 1)  # grey like the run's own images
    np.testing.assert_array_equal(rows["image"][0], 200)


def test_an_objectnet_that_does_not_fit_is_refused(tmp_path):
    home = write_objectnet(tmp_path / "few", shared=112)
    with pytest.raises(
        ValueError, match="313 classes, 112 of them .* want 313 and 113"
    ):
        find(f"objectnet={home}")
    home = write_objectnet(tmp_path / "two", first=2)
    with pytest.raises(ValueError, match="1000 numbers from 2 on"):
        find(f"objectnet={home}")
    home = write_objectnet(tmp_path / "alike")
    path = home / "mappings" / "objectnet_to_imagenet_1k.json"
    path.write_text(path.read_text().replace("thing 7, item 7", "thing 998, item 998"))
    with pytest.raises(ValueError, match="'thing 998, item 998' is 2 lines of labels"):
        find(f"objectnet={home}")
    path.unlink()
    with pytest.raises(ValueError, match="objectnet_to_imagenet_1k.json"):
        find(f"objectnet={home}")
    home = write_objectnet(tmp_path / "image")
    (home / "images" / "folder_003" / "x.png").unlink()
    (home / "images" / "folder_003").rmdir()
    with pytest.raises(ValueError, match="has 312 class folders, want its 313"):
        find(f"objectnet={home}")
    with pytest.raises(ValueError, match="no folder is named; want 'objectnet=FOLDER'"):
        find("objectnet")
    assert (objectnet.FOLDERS, objectnet.SHARED) == (313, 113)


def test_environment_variables_name_folders(tmp_path, monkeypatch):
    home = write_objectnet(tmp_path / "objectnet")
    with pytest.raises(ValueError, match="in the environment variable OBJECTNET_DIR"):
        find("objectnet")
    monkeypatch.setenv("OBJECTNET_DIR", str(home))
    assert len(find("objectnet")) == len(find(f"objectnet={home}"))
    with pytest.raises(ValueError, match="no folder '/nowhere'"):
        find("objectnet=/nowhere")  # the command goes first
    with pytest.raises(ValueError, match="in the environment variable CUE_CONFLICT"):
        find("cue_conflict")
    for name in conflicts.CATEGORIES:
        save(tmp_path / "cues" / name / f"{name}1-{name}2.png")
    monkeypatch.setenv("CUE_CONFLICT_DIR", str(tmp_path / "cues"))
    assert len(find("cue_conflict")) == 16


# Cue conflicts.


def test_cue_conflicts_by_their_names(tmp_path):
    names = tuple(conflicts.CATEGORIES)
    for name in names:
        save(tmp_path / name / f"{name}1-{name}2.png")
    save(tmp_path / "cat" / "cat7-elephant1.png", value=9)
    found = find(f"cue_conflict={tmp_path}")
    assert len(found) == 17 and found.classes == names and found.pairs
    (labels,) = (
        found[i]["labels"]
        for i in range(17)
        if found[i]["image"] == prepared.encoded(9)
    )
    assert labels == (names.index("cat"), names.index("elephant"))
    save(tmp_path / "cat" / "dog1-cat1.png")
    with pytest.raises(ValueError, match="dog1-cat1.png: want a name such as cat7-ele"):
        find(f"cue_conflict={tmp_path}")
    (tmp_path / "cat" / "dog1-cat1.png").unlink()
    save(tmp_path / "horse" / "horse1-cat1.png")
    with pytest.raises(ValueError, match="17 class folders, want its 16 .*: horse"):
        find(f"cue_conflict={tmp_path}")


def test_drawn_conflicts_have_every_pair():
    found = find("cues")
    pairs = [found[i]["labels"] for i in range(len(found))]
    assert len(pairs) == 8 * 8 * 7
    counts = {pair: pairs.count(pair) for pair in set(pairs)}
    assert len(counts) == 56 and set(counts.values()) == {8}
    assert all(shape != texture for shape, texture in counts)
    # All drawings differ.
    images = {found[i]["image"].tobytes() for i in range(len(found))}
    assert len(images) == len(found)


# Digits.


@pytest.mark.parametrize("name", presets.SHIFTS["digits"])
def test_shifts_are_shifts(name):
    found, plain = find(name), DIGITS.held_out()
    shift = name.removeprefix("digits_")
    chosen = range(10) if shift != "rotation" else ROTATED
    records = [i for i in range(len(plain)) if plain[i]["label"] in chosen]
    assert len(found) == len(records) and len(found.classes) == len(chosen)
    images = np.stack([found[i]["image"] for i in range(len(found))]).astype(int)
    own = np.stack([plain[i]["image"] for i in records]).astype(int)
    changed = np.abs(images - own).mean(axis=(1, 2, 3))
    assert changed.min() > 5
    # Shifted digits stay legible: a model of plain digits knows most, but not all.
    flat = own.reshape(len(own), -1) / 255
    labels = np.array([plain[i]["label"] for i in records])
    members = np.array(
        [found.members[found[i]["labels"][0]] for i in range(len(found))]
    )
    np.testing.assert_array_equal(members[:, 0], labels)
    model = LogisticRegression(max_iter=500).fit(flat, labels)
    shares = [model.score(x.reshape(len(x), -1) / 255, labels) for x in (own, images)]
    assert shares[0] > 0.97 and shares[1] < shares[0] - 0.05
    assert shares[1] > 0.4 or shift == "inversion"  # a linear model knows none of these


def test_each_shift_does_what_it_is_called():
    image = np.asarray(DIGITS.held_out()[4]["image"])
    pixels = image.astype(float)
    see = {name: shifted(image, name, 4).astype(float) for name in SHIFT_NAMES}
    np.testing.assert_array_equal(see["inversion"], 255 - pixels)
    np.testing.assert_allclose(
        see["contrast"], 127.5 + 0.3 * (pixels - 127.5), atol=0.51
    )
    roughness = lambda x: np.abs(np.diff(x, axis=0)).mean()  # noqa: E731
    assert roughness(see["blur"]) < 0.8 * roughness(pixels)
    assert roughness(see["noise"]) > 1.1 * roughness(pixels)
    # A quarter of white, where neither black nor white cuts the noise.
    grey = np.full((60, 60, 1), 128, np.uint8)
    assert shifted(grey, "noise", 0).std() == pytest.approx(0.25 * 255, rel=0.1)
    assert not np.array_equal(shifted(image, "noise", 4), shifted(image, "noise", 5))
    # A bar turned by 30 degrees, its angle from the moments of its pixels.
    bar = np.zeros((41, 41, 1), np.uint8)
    bar[19:22, 5:36] = 255
    angles = []
    for index in (0, 1):
        rows, cols = np.nonzero(shifted(bar, "rotation", index)[..., 0] > 128)
        rows, cols = rows - rows.mean(), cols - cols.mean()
        double = np.arctan2(2 * (rows * cols).mean(), (cols**2 - rows**2).mean())
        angles.append(np.degrees(double / 2))
    assert sorted(angles) == pytest.approx([-30, 30], abs=1.5)


def test_any_grey_source_with_labels_is_shifted():
    plain = Mnist().held_out()
    rotated = find("shift_rotation", source=Mnist())
    assert len(rotated) == 700 and rotated.classes == tuple("7351402")
    inverted = find("shift_inversion", source=Few(source=Mnist(), images=1))
    assert len(inverted) == len(plain) == 1000  # of the held-out images, not of the few
    for index in (0, 500, 999):
        want = 255 - plain[index]["image"].astype(int)
        np.testing.assert_array_equal(inverted[index]["image"], want)
        assert inverted[index]["labels"] == (plain[index]["label"],)
    drawn = find("shift_rotation", source=Cues(images=16, held_out_images=8))
    assert drawn.model_classes == 8 and drawn.members == tuple((i,) for i in range(8))
    # A blur grows with the image: an edge becomes a Gaussian's distribution.
    for side in (32, 128):
        edge = np.zeros((side, side, 1), np.uint8)
        edge[:, side // 2 :] = 255
        distance = np.arange(side) - side / 2 + 0.5
        want = 255 * stats.norm.cdf(distance / (0.7 * np.sqrt(side / 8)))
        found = shifted(edge, "blur", 0)[side // 2, :, 0]
        np.testing.assert_allclose(found, want, atol=2)
    with pytest.raises(ValueError, match="Photos has 3 channel.s. and 0 classes: want"):
        find("shift_blur", source=Photos())


SHIFT_NAMES = ("blur", "noise", "rotation", "contrast", "inversion")


def test_rotated_digits_have_an_order_of_their_own():
    found = find("digits_rotation")
    assert found.classes == tuple("7351402") and len(found.classes) == 7
    assert found.members == ((7,), (3,), (5,), (1,), (4,), (0,), (2,))
    assert found.model_classes == 10


# Passes.


@pytest.mark.parametrize("batch_size", [1, 7, 64, 500])
def test_each_image_comes_once(batch_size):
    found = passes(batch_size=batch_size).evaluation_set("digits_rotation")
    rows = whole(found)
    count = len(found.images)
    assert rows["image"].dtype == np.uint8 and rows["labels"].dtype == np.int32
    assert len(rows["index"]) % batch_size == 0
    assert rows["index"][rows["valid"]].tolist() == list(range(count))
    assert (rows["index"][~rows["valid"]] == -1).all()
    assert (rows["labels"][~rows["valid"]] == -1).all()
    assert not rows["image"][~rows["valid"]].any() and not rows["replaced"].any()
    for index in (0, 100, count - 1):
        np.testing.assert_array_equal(
            rows["image"][index], found.images[index]["image"]
        )
        assert tuple(rows["labels"][index]) == found.images[index]["labels"]


def test_workers_read_the_same():
    found = passes(batch_size=100).evaluation_set("cues")
    here = whole(found)
    data = dataclasses.replace(found.data, workers=1)
    there = whole(dataclasses.replace(found, data=data))
    for name in here:
        np.testing.assert_array_equal(here[name], there[name])


def test_a_file_that_is_no_image_is_no_image(tmp_path):
    for label in range(1000):
        save(tmp_path / str(label) / "a.png", value=7)
    (tmp_path / "3" / "a.png").write_bytes(b"no picture")
    rows = whole(passes(batch_size=300).evaluation_set(f"imagenet_v2={tmp_path}"))
    assert rows["valid"].sum() == 999 and not rows["valid"][3]
    assert rows["index"][3] == 3 and rows["replaced"].sum() == 1
