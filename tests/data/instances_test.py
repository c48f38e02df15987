# SPDX-License-Identifier: Apache-2.0
"""Objects in images: the scenes, COCO's folder, and examples made of both."""

import copy
import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from mim_jax.data import coco
from mim_jax.data.decoding import decode
from mim_jax.data.examples.instances import Instances
from mim_jax.data.input import Input
from mim_jax.data.passes import EvalPasses
from mim_jax.data.pipeline import eval_batches, train_batches
from mim_jax.data.segments import box_of, mask_of, objects_of, runs_of
from mim_jax.data.sources import scenes
from mim_jax.data.sources.coco import Coco
from mim_jax.data.sources.mnist import Mnist
from mim_jax.data.sources.photos import HELD_OUT, TRAIN
from mim_jax.data.sources.scenes import Scenes

SCENES = Scenes(images=40, held_out_images=20, side=48)


# Segments.


def test_runs_and_masks_are_inverses():
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (5, 3), (4, 9)):
        for mask in (
            rng.random(shape) > 0.5,
            np.zeros(shape, bool),
            np.ones(shape) > 0,
        ):
            np.testing.assert_array_equal(mask_of(runs_of(mask), shape), mask)


def test_runs_and_polygons_are_pycocotools():
    tools = pytest.importorskip("pycocotools.mask")
    mask = np.random.default_rng(0).random((7, 5)) > 0.5
    packed = tools.encode(np.asfortranarray(mask.astype(np.uint8)))
    ours = tools.frPyObjects(runs_of(mask), 7, 5)
    assert ours == packed
    np.testing.assert_array_equal(mask_of(packed, (7, 5)), mask)
    # Two squares: three columns of the first, all of the second.
    squares = [[1, 1, 4, 1, 4, 3, 1, 3], [0, 5, 2, 5, 2, 7, 0, 7]]
    found = mask_of(squares, (7, 5))
    assert found.sum() == 3 * 2 + 2 * 2 and found[1, 1] and found[6, 1]
    assert mask_of([], (7, 5)) is None and mask_of([[1, 1, 2, 2]], (7, 5)) is None


def test_runs_of_another_image_are_refused():
    with pytest.raises(ValueError, match="size=.*want the same"):
        mask_of({"size": [3, 3], "counts": [9]}, (4, 4))
    with pytest.raises(ValueError, match="counts sum to 9 .*want 16"):
        mask_of({"size": [4, 4], "counts": [9]}, (4, 4))


# Scenes.


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_scenes_have_exact_boxes_and_masks(split):
    source = dataclasses.replace(SCENES, split=split)
    seen = set()
    for index in range(len(source)):
        record = source[index]
        masks = [mask_of(one, (48, 48)) for one in record["segments"]]
        assert 1 <= len(masks) <= source.most
        assert not (np.sum(masks, axis=0) > 1).any()  # a pixel shows one object
        for mask, box, area in zip(
            masks, record["boxes"], record["areas"], strict=True
        ):
            assert box_of(mask) == tuple(box) and mask.sum() == area > 0
            colours = record["image"][mask]
            assert (colours == colours[0]).all()
        seen |= set(record["classes"].tolist())
    assert seen <= set(range(14)) and len(seen) > 10
    assert source.object_classes[:2] == ("0", "1") and source.classes == ()


def test_a_scene_is_drawn_once_and_cannot_be_changed(monkeypatch):
    drawn = []

    class Counted(Scenes):
        def _draw(self, index):
            drawn.append(index)
            return super()._draw(index)

    source = Counted(images=2, held_out_images=2, side=48)
    first = source[1]
    before = copy.deepcopy(first)
    for value in first.values():
        if isinstance(value, np.ndarray):
            value[...] = 0
    first["segments"][0]["counts"].clear()
    again = source[1]
    assert list(again) == list(before) and again["segments"] == before["segments"]
    for key, value in before.items():
        np.testing.assert_array_equal(again[key], value, err_msg=key)
    assert drawn == [1]
    _ = source.held_out()[0], source.held_out()[0]
    assert drawn == [1, 0]
    monkeypatch.setattr(scenes, "_KEPT", 1)  # more scenes than are kept
    large = Counted(images=2, side=48)
    _ = large[1], large[1]
    assert drawn == [1, 0, 1, 1]


def test_an_object_differs_from_what_it_covers():
    for covered in (0.0, 90.0, 127.0, 128.0, 255.0):
        rng = np.random.default_rng(0)
        for _ in range(200):
            found = scenes._colour(np.full(3, covered), rng).mean()
            assert abs(found - covered) >= 80


def test_scenes_have_the_counts_and_sizes_that_they_promise():
    source = Scenes(images=200, visible=1.0)  # nothing is covered
    sides, counts = [], set()
    for record in map(source.__getitem__, range(200)):
        counts.add(len(record["boxes"]))
        sides += [max(x - a, y - b) for a, b, x, y in record["boxes"].tolist()]
    assert counts == {1, 2, 3}
    # A square that is turned reaches past its own side; a star may stay below it.
    assert 0.15 * 64 < min(sides) < 0.3 * 64 and 0.45 * 64 < max(sides) <= 0.75 * 64


def test_objects_overlap_and_keep_the_share_that_is_promised():
    """With visible=1 nothing may be covered: then an object's pixels are all shown."""
    covered = 0
    for index in range(len(SCENES)):
        boxes = SCENES[index]["boxes"]
        low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
        high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
        area = (high - low).clip(0).prod(axis=2)
        covered += (area[~np.eye(len(boxes), dtype=bool)] > 0).any()
    assert covered > 5
    apart = dataclasses.replace(SCENES, visible=1.0)
    discs = [
        area / (np.pi / 4 * (box[2] - box[0]) * (box[3] - box[1]))
        for one in (apart[index] for index in range(40))
        for box, area, label in zip(
            one["boxes"], one["areas"], one["classes"], strict=True
        )
        if label == 10
    ]
    np.testing.assert_allclose(discs, 1, atol=0.12)


def test_held_out_digits_and_photographs_stay_held_out(monkeypatch):
    held_out = SCENES.held_out()
    assert held_out._photos.files == HELD_OUT and SCENES._photos.files == TRAIN
    digits = {one.tobytes() for one in Mnist(split="held_out")._data[0]}
    assert not digits & {one.tobytes() for one in SCENES._digits._data[0]}
    assert digits >= {one.tobytes() for one in held_out._digits._data[0]}


# COCO's folder.


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    words = [f"--to={folder}", "--images=6", "--held_out_images=4"]
    assert coco.main(words) == 0
    return folder


def test_the_command_writes_what_the_source_reads(written, capsys):
    ours = Scenes(images=6, held_out_images=4)
    theirs = Coco(path=str(written))
    for one, other in ((ours, theirs), (ours.held_out(), theirs.held_out())):
        assert len(one) == len(other) and one.object_classes == other.object_classes
        for index in range(len(one)):
            want, got = one[index], other[index]
            np.testing.assert_array_equal(decode(got["image"], 3), want["image"])
            for name in ("boxes", "classes", "crowd", "areas"):
                np.testing.assert_array_equal(got[name], want[name], err_msg=name)
            assert got["segments"] == want["segments"]
    assert theirs.note == ""
    assert coco.main([f"--to={written}"]) == 1
    assert "exists: name another --to" in capsys.readouterr().err


def test_pycocotools_reads_the_folder(written):
    tools = pytest.importorskip("pycocotools.coco")
    found = tools.COCO(str(written / "annotations" / "instances_val2017.json"))
    source = Scenes(images=6, held_out_images=4).held_out()
    for index in range(4):
        record = source[index]
        entries = found.loadAnns(found.getAnnIds(imgIds=[index + 1]))
        for one, segment in zip(entries, record["segments"], strict=True):
            want = mask_of(segment, (64, 64))
            np.testing.assert_array_equal(found.annToMask(one), want)


def broken(folder, change):
    """A folder with one image, whose JSON was changed."""
    for name in ("train2017", "val2017"):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (8, 6)).save(folder / name / "a.png")
        one = {
            "images": [{"id": 7, "file_name": "a.png", "height": 6, "width": 8}],
            "annotations": [
                {
                    "id": 41,
                    "image_id": 7,
                    "category_id": 90,
                    "bbox": [1, 1, 3, 2],
                    "area": 6,
                    "iscrowd": 0,
                    "segmentation": [[1, 1, 4, 1, 4, 3, 1, 3]],
                }
            ],
            "categories": [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car"}],
        }
        change(one)
        file = folder / "annotations" / f"instances_{name}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(one if isinstance(one, str) else json.dumps(one))
    return str(folder)


def test_classes_are_numbered_by_category_id(tmp_path):
    source = Coco(path=broken(tmp_path, lambda one: None))
    assert source.object_classes == ("car", "toothbrush")
    record = source[0]
    assert record["classes"].tolist() == [1] and record["ids"] == [41]
    assert record["boxes"].tolist() == [[1, 1, 4, 3]]
    assert "a.png (id 7)" in source.name_of(0)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda one: one.pop("images"), "no list 'images'"),
        (lambda one: one["images"][0].pop("width"), r"id 7\) has no width"),
        (lambda one: one["annotations"][0].pop("bbox"), r"id 41\) has no bbox"),
        (
            lambda one: one["annotations"].append(dict(one["annotations"][0])),
            "two entries of 'annotations' have the id 41",
        ),
        (
            lambda one: one["annotations"][0].update(image_id=8),
            "annotation 41 has image_id 8, which no image has",
        ),
        (
            lambda one: one["annotations"][0].update(category_id=4),
            "annotation 41 has category_id 4, which no category has; want one of 3, 90",
        ),
        (
            lambda one: one["annotations"][0].update(bbox=[1, 2, 3]),
            r"annotation 41 has bbox \[1, 2, 3\]: want left, top, width and height",
        ),
        (
            lambda one: one["annotations"][0].update(bbox=[1, 2, float("nan"), 3]),
            "annotation 41 has bbox .*nan",
        ),
        (lambda one: one["images"][0].update(file_name="b.png"), "b.png, image 7 of"),
        (lambda one: one["annotations"].clear(), "has no image with objects"),
    ],
)
def test_broken_files_are_refused_with_file_and_id(tmp_path, change, message):
    path = broken(tmp_path, change)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        Coco(path=path)
    assert "instances_train2017.json" in str(caught.value)


def test_broken_json_and_missing_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("COCO_DIR", raising=False)
    path = broken(tmp_path / "a", lambda one: None)
    file = tmp_path / "a" / "annotations" / "instances_train2017.json"
    file.write_text(file.read_text()[:-9])
    with pytest.raises(ValueError, match=f"{file} is no JSON: .*want a sound file"):
        Coco(path=path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="does not exist; want PATH/annot"):
        Coco(path=path)
    with pytest.raises(FileNotFoundError, match="path is empty, and so is COCO_DIR"):
        Coco()
    monkeypatch.setenv("COCO_DIR", broken(tmp_path / "b", lambda one: None))
    assert len(Coco()) == 1


def test_odd_annotations_are_counted_with_their_ids(tmp_path):
    def change(one):
        base = one["annotations"][0]
        one["annotations"] += [
            base | {"id": 42, "bbox": [5, 1, 9, 2]},
            base | {"id": 43, "bbox": [1, 1, 0, 2]},
            base | {"id": 44, "segmentation": []},
        ]

    source = Coco(path=broken(tmp_path, change))
    assert "1 boxes reach over the border (id 42)" in source.note
    assert "1 boxes have no area (id 43)" in source.note
    assert "1 objects have no mask (id 44)" in source.note


# Examples.


def examples_of(source, size=(48, 48), **fields):
    own = dict(jitter=(1.0, 1.0), most=6, mask_side=48) | fields
    flip = own.pop("flip", False)
    return Input(
        source=source,
        image_size=size,
        examples=Instances(**own),
        workers=0,
        flip=flip,
    )


def read(data, steps=5):
    with train_batches(data, seed=0, batch_size=8, stop=steps) as batches:
        found = list(batches)
    return {key: np.concatenate([one[key] for one in found]) for key in found[0]}


def check_objects(shown, mean):
    """Where an object is, the image has its one colour, but at edges that the resize
    has blurred."""
    shares = []
    for row in range(len(shown["image"])):
        for place in np.flatnonzero(shown["boxes_valid"][row]):
            left, top, right, bottom = shown["boxes"][row, place]
            mask = shown["masks"][row, place]
            side = len(mask)
            y = top + (np.arange(side) + 0.5) / side * (bottom - top)
            x = left + (np.arange(side) + 0.5) / side * (right - left)
            seen = shown["image"][row][y.astype(int)[:, None], x.astype(int)]
            colours = seen[mask].astype(int)
            middle = np.median(colours, axis=0)
            shares.append((np.abs(colours - middle) < 40).all(axis=1).mean())
    assert len(shares) > 20 and np.mean(shares) > mean, np.mean(shares)


def test_an_example_has_the_record_s_boxes_and_masks():
    data = examples_of(SCENES)
    shown = read(data)
    for row, index in enumerate(shown["index"]):
        record = SCENES[int(index)]
        np.testing.assert_array_equal(shown["image"][row], record["image"])
        count = len(record["boxes"])
        assert shown["boxes_valid"][row].sum() == count
        got = {tuple(one) for one in shown["boxes"][row][:count]}
        assert got == {tuple(one) for one in record["boxes"]}
    check_objects(shown, mean=0.9999)
    assert (shown["size"] == 48).all() and (shown["label"] == -1).all()


@pytest.mark.parametrize(
    "fields, mean",
    [
        (dict(flip=True), 0.9999),
        (dict(jitter=(2.0, 2.0)), 0.8),
        (dict(jitter=(0.4, 0.6), flip=True), 0.65),  # strokes of a pixel are blurred
        (dict(jitter=(1.5, 2.5), flip=True, size=(40, 64)), 0.8),
    ],
    ids=str,
)
def test_objects_move_with_the_picture(fields, mean):
    shown = read(examples_of(SCENES, **fields))
    check_objects(shown, mean)
    rows, cols = shown["size"].T
    valid, boxes = shown["boxes_valid"], shown["boxes"]
    for row in range(len(boxes)):
        inside = boxes[row][valid[row]]
        assert (inside >= 0).all() and (inside[:, 2] <= cols[row]).all()
        assert (inside[:, 3] <= rows[row]).all()
        assert (shown["image"][row, rows[row] :] == 128).all()
        assert (shown["image"][row, :, cols[row] :] == 128).all()


class Ramp(Scenes):
    """One image: red is the column, green the row; it has one object."""

    def __getitem__(self, index):
        rows, cols = np.mgrid[:48, :48].astype(np.uint8) * 5
        whole = dict(image=np.stack([cols, rows, 0 * rows], axis=-1), label=-1)
        one = dict(boxes=np.array([[0, 0, 48, 48]], np.float32), ids=[0])
        rest = dict(classes=np.zeros(1, np.int32), crowd=np.zeros(1, bool))
        mask = dict(areas=np.array([48.0**2]), segments=[runs_of(rows >= 0)])
        return whole | one | rest | mask


RAMP = Ramp(images=8, side=48)


def test_the_window_of_a_larger_picture_is_drawn_evenly_and_mirrored_half_the_time():
    shown = read(examples_of(RAMP, jitter=(2.0, 2.0), flip=True), steps=50)
    across, down = (shown["image"][..., c].astype(int) for c in (0, 1))
    mirrored = across[:, 20, -1] < across[:, 20, 0]
    assert abs(mirrored.mean() - 0.5) < 0.1
    for start in (across.min(axis=(1, 2)), down.min(axis=(1, 2))):
        share = (start - start.min()) / np.ptp(start)
        assert abs(share.mean() - 0.5) < 0.06 and abs(share.std() - 12**-0.5) < 0.03


def test_the_size_of_a_picture_is_drawn_evenly():
    shown = read(examples_of(RAMP, jitter=(0.2, 1.0)), steps=50)
    share = shown["size"][:, 0] / 48
    assert abs(share.mean() - 0.6) < 0.05
    assert share.min() < 0.25 and share.max() > 0.95


def test_a_cut_object_has_the_box_of_what_is_shown():
    """At twice the size most scenes lose parts of their objects; what is left touches
    all four sides of its box."""
    shown = read(examples_of(SCENES, jitter=(2.0, 2.0)))
    valid = shown["boxes_valid"]
    masks = shown["masks"][valid]
    for edge in (masks[:, 0], masks[:, -1], masks[:, :, 0], masks[:, :, -1]):
        assert edge.any(axis=1).mean() > 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class Odd(Scenes):
    """Records with 200 objects, a crowd, a box without area, one over the border and
    one without a mask."""

    def __getitem__(self, index):
        record = super().__getitem__(index)
        boxes = np.tile(np.array([[2, 2, 6, 6]], np.float32), (204, 1))
        boxes[200:] = (0, 0, 40, 40), (5, 5, 5, 9), (-9, 30, 20, 60), (9, 9, 30, 30)
        if index % 2:
            boxes = boxes[:0]
        count = len(boxes)
        masks = [np.zeros((self.side, self.side), bool) for _ in boxes]
        for mask, box in zip(masks, boxes.astype(int).clip(0), strict=True):
            mask[box[1] : box[3], box[0] : box[2]] = True
        segments = [runs_of(one) for one in masks]
        segments[203:] = [None] * len(segments[203:])
        return record | {
            "boxes": boxes,
            "classes": np.full(count, 3, np.int32),
            "crowd": np.arange(count) == 200,
            "areas": np.ones(count),
            "segments": segments,
            "ids": list(range(count)),
        }


def test_edge_cases_of_objects():
    shown = read(examples_of(Odd(images=40, side=48), most=100), steps=2)
    for row, index in enumerate(shown["index"]):
        valid, boxes = shown["boxes_valid"][row], shown["boxes"][row]
        if index % 2:  # no object
            assert not valid.any() and (boxes == 0).all()
            assert (shown["categories"][row] == -1).all()
            continue
        # The largest come first: without a mask, then the one over the border.
        assert valid.all() and len(valid) == 100
        assert boxes[:3].tolist() == [[9, 9, 30, 30], [0, 30, 20, 48], [2, 2, 6, 6]]
        assert not shown["masks_valid"][row, 0] and shown["masks_valid"][row, 1:].all()
        assert shown["masks"][row, 1].all()


def test_a_broken_mask_names_its_annotation(tmp_path):
    def change(one):
        one["annotations"][0]["segmentation"] = {"size": [9, 9], "counts": [81]}

    data = examples_of(Coco(path=broken(tmp_path, change)))
    data = dataclasses.replace(data, max_replaced=1.0)
    with pytest.raises(RuntimeError, match=r"\(id 7\).*annotation 41: size=\[9, 9\]"):
        read(data, steps=1)


def test_evaluation_shows_the_whole_picture_with_its_first_shape(tmp_path):
    data = examples_of(Coco(path=broken(tmp_path, lambda one: None)), size=(32, 32))
    with eval_batches(data, batch_size=2) as batches:
        (batch,) = list(batches)
    assert batch["size"].tolist() == [[24, 32], [0, 0]]
    assert batch["shape"].tolist() == [[6, 8], [0, 0]]
    assert (batch["image"][0, 24:] == 128).all() and not batch["image"][0, :24].any()
    objects = EvalPasses(data).objects("held_out", 0, (6, 8))
    assert objects.boxes.tolist() == [[1, 1, 4, 3]]


def test_tfds_objects_become_pixels():
    record = {
        "image": np.zeros((20, 40, 3), np.uint8),
        "objects": {
            "bbox": np.array([[0.1, 0.25, 0.6, 0.5]], np.float32),
            "label": np.array([4]),
            "is_crowd": np.array([True]),
            "area": np.array([100]),
            "id": np.array([12]),
        },
    }
    found = objects_of(record, (20, 40))
    np.testing.assert_allclose(found.boxes, [[10, 2, 20, 12]], rtol=1e-6)
    assert found.crowd.tolist() == [True] and found.ids == [12]
    assert found.classes.tolist() == [4] and found.segments == [None]
    with pytest.raises(ValueError, match="image, label and no objects: want a source"):
        objects_of({"image": 0, "label": 1}, (1, 1))
