# SPDX-License-Identifier: Apache-2.0
"""Average precision: of perfect and of shifted answers, and as pycocotools has it."""

import contextlib
import io

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("pycocotools")

from passes import Given
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from pycocotools.mask import encode

from mim_jax.data import coco as writing
from mim_jax.data.segments import Objects, mask_of, runs_of
from mim_jax.data.sources.coco import Coco
from mim_jax.data.sources.scenes import Scenes
from mim_jax.evals.base import Run
from mim_jax.evals.detection import DetectionAP, Truth, answers_of, pasted, scores
from mim_jax.objectives.base import Found
from mim_jax.objectives.detection import Detection
from mim_jax.objectives.mae import MAE

SIDE = 64
SOURCE = Scenes(images=4, held_out_images=30).held_out()
NAMES = SOURCE.object_classes


def objects(index):
    record = SOURCE[index]
    names = ("boxes", "classes", "crowd", "areas", "segments", "ids")
    return Objects(*(record[name] for name in names))


def found_of(given, shift=0.0, resolution=112):
    """What a model answers that sees the objects as they are, but for a shift to the
    right by a share of their width."""
    boxes = np.array(given.boxes)
    masks = np.zeros((len(boxes), resolution, resolution), np.float32)
    share = (np.arange(resolution) + 0.5) / resolution
    for mask, box, segment in zip(masks, boxes, given.segments, strict=True):
        whole = mask_of(segment, (SIDE, SIDE))
        x = (box[0] + share * (box[2] - box[0])).astype(int)
        y = (box[1] + share * (box[3] - box[1])).astype(int)
        mask[:] = whole[y[:, None], x]
    boxes[:, [0, 2]] += shift * (boxes[:, 2] - boxes[:, 0])[:, None]
    valid = ~given.crowd
    scores = np.linspace(0.9, 0.8, len(boxes)).astype(np.float32)
    return Found(boxes, scores, given.classes, valid, masks)


def measured(shift=0.0, shape=(SIDE, SIDE), size=(SIDE, SIDE), images=30):
    truth, answers = Truth(NAMES), []
    for index in range(images):
        given = objects(index)
        truth.add(index, shape, given)
        answers += answers_of(index, found_of(given, shift), np.array(size), shape)
    return scores(truth, answers)


def test_a_perfect_prediction_scores_one_and_a_shifted_one_less():
    numbers, arrays = measured()
    assert numbers["ap_box"].value == pytest.approx(1, abs=1e-9)
    assert numbers["ap_mask"].value == pytest.approx(1, abs=1e-9)
    assert numbers["recall_box"].value == pytest.approx(1, abs=1e-9)
    assert numbers["ap50_box"].value == pytest.approx(1, abs=1e-9)
    assert np.nanmin(arrays["ap_box_by_class"]) == pytest.approx(1, abs=1e-9)
    before = 1.0
    for shift in (0.05, 0.2, 0.4):
        numbers, _ = measured(shift)
        assert numbers["ap_box"].value < before - 0.05, shift
        before = numbers["ap_box"].value
    assert numbers["ap75_box"].value == 0  # of 0.4: the overlap is 3 / 7


def test_without_answers_the_score_is_zero():
    truth = Truth(NAMES)
    truth.add(0, (SIDE, SIDE), objects(0))
    numbers, arrays = scores(truth, [])
    assert numbers["ap_box"].value == 0 and numbers["ap_mask"].value == 0
    present = np.isin(np.arange(14), objects(0).classes)
    np.testing.assert_array_equal(np.isnan(arrays["ap_box_by_class"]), ~present)


def test_without_objects_there_is_nothing_to_measure():
    with pytest.raises(ValueError, match="have no objects; want some"):
        scores(Truth(NAMES), [])


def test_boxes_alone_are_measured_where_no_object_has_a_mask():
    truth, given = Truth(NAMES), objects(0)
    truth.add(0, (SIDE, SIDE), given._replace(segments=[None] * len(given.boxes)))
    numbers, _ = scores(
        truth, answers_of(0, found_of(given), np.array([SIDE, SIDE]), (SIDE, SIDE))
    )
    assert numbers["ap_box"].value == pytest.approx(1) and "ap_mask" not in numbers


def test_answers_in_a_crowd_are_no_mistakes():
    mask = np.zeros((SIDE, SIDE), bool)
    mask[:, 32:] = True
    single = np.zeros_like(mask)
    single[4:12, 4:12] = True
    given = Objects(
        boxes=np.array([[4, 4, 12, 12], [32, 0, 64, 64]], np.float32),
        classes=np.array([2, 2], np.int32),
        crowd=np.array([False, True]),
        areas=np.array([64.0, 2048.0]),
        segments=[runs_of(single), runs_of(mask)],
        ids=[1, 2],
    )
    shown = found_of(given)
    # Two answers of higher scores, inside the crowd or on plain ground.
    extra = np.array([[40, 8, 50, 20], [14, 40, 26, 56]], np.float32)
    for number, want in ((0, 1.0), (1, 0.5)):
        both = Found(
            np.concatenate([extra[number : number + 1], shown.boxes]),
            np.concatenate([np.float32([0.95]), shown.scores]),
            np.full(3, 2, np.int32),
            np.concatenate([[True], shown.valid]),
            np.concatenate([np.ones_like(shown.masks[:1]), shown.masks]),
        )
        truth = Truth(NAMES)
        truth.add(0, (SIDE, SIDE), given)
        answers = answers_of(0, both, np.array([SIDE, SIDE]), (SIDE, SIDE))
        assert len(answers) == 2
        numbers, _ = scores(truth, answers)
        assert numbers["ap_box"].value == pytest.approx(want, abs=1e-9)


def test_boxes_go_back_to_the_size_of_the_picture():
    given = objects(0)
    (entry, *_) = answers_of(0, found_of(given), np.array([64, 64]), (128, 32))
    box = given.boxes[0]
    want = [box[0] / 2, 2 * box[1], (box[2] - box[0]) / 2, 2 * (box[3] - box[1])]
    np.testing.assert_allclose(entry["bbox"], want, rtol=1e-5)
    assert entry["segmentation"]["size"] == [128, 32]


def test_pasting_fills_the_box_and_is_cut_at_the_border():
    whole = np.ones((28, 28), np.float32)
    found = pasted(whole, np.array([3.0, 2.0, 7.0, 9.0]), (12, 10))
    want = np.zeros((12, 10), bool)
    want[2:9, 3:7] = True
    np.testing.assert_array_equal(found, want)
    found = pasted(whole, np.array([-5.0, 6.0, 4.0, 30.0]), (12, 10))
    assert found[6:, :4].all() and found.sum() == 6 * 4
    assert not pasted(whole, np.array([4.0, 4.0, 4.0, 9.0]), (12, 10)).any()
    assert not pasted(whole, np.array([40.0, 4.0, 50.0, 9.0]), (12, 10)).any()


def test_ap_of_our_files_is_that_of_pycocotools_by_hand(tmp_path):
    """The folder that the command writes, read by pycocotools alone."""
    writing.write(Scenes(images=2, held_out_images=30), tmp_path)
    source = Coco(path=str(tmp_path)).held_out()
    numbers, _ = measured(shift=0.1)
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO(str(tmp_path / "annotations" / "instances_val2017.json"))
        answers = []
        for index in range(len(source)):
            found = found_of(objects(index), 0.1)
            for box, label, score in zip(
                found.boxes.tolist(), found.classes, found.scores, strict=True
            ):
                sides = [box[2] - box[0], box[3] - box[1]]
                one = {"image_id": index + 1, "category_id": int(label) + 1}
                answers.append(one | {"bbox": box[:2] + sides, "score": float(score)})
        run = COCOeval(known, known.loadRes(answers), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    keys = ("ap_box", "ap50_box", "ap75_box")
    for key, value in zip(keys, run.stats, strict=False):
        assert numbers[key].value == pytest.approx(float(value), abs=1e-9)
    assert 0.5 < numbers["ap_box"].value < 1
    assert numbers["recall_box"].value == pytest.approx(float(run.stats[8]))


class _Seer(Detection):
    """Answers with the objects that it is told."""

    def detect(self, params, images, size):
        return params


@pytest.mark.parametrize("least", [0.5, 0.0])
def test_a_run_is_measured_and_drawn(least):
    given = [objects(index) for index in range(3)]
    most = 1 + max(len(one.boxes) for one in given)

    def padded(one):
        found = found_of(one, resolution=28)
        room = most - len(found.boxes)
        return [np.pad(x, [(0, room)] + [(0, 0)] * (x.ndim - 1)) for x in found]

    rows = [padded(one) for one in given]
    rows.append(rows[0])  # padding
    params = Found(*(jnp.asarray(np.stack(x)) for x in zip(*rows, strict=True)))
    shapes = np.full((4, 2), SIDE, np.int32)
    batch = {
        "image": np.stack([SOURCE[i]["image"] for i in (0, 1, 2, 0)]),
        "index": np.array([0, 1, 2, -1], np.int32),
        "valid": np.array([True, True, True, False]),
        "size": shapes,
        "shape": shapes,
    }
    data = Given([batch], given=dict(enumerate(given)), object_classes=NAMES)
    run = Run(objective=_Seer(), params=params, initial=None, step=1, name="x")
    evaluation = DetectionAP(shown=2, least=least)
    evaluation.check_objective(run.objective)
    evaluation.check_data(run.objective, data)
    report = evaluation.measure(run, data)
    assert report.numbers["ap_box"].value == pytest.approx(1)
    assert report.numbers["images"].value == 3
    assert report.arrays["images"].shape == (2, SIDE, SIDE, 3)
    figures = evaluation.draw({"x, step 1": report})
    assert figures.keys() == {"classes", "detections"}
    # A frame for each object shown, and its name.
    shown = sum(len(one.boxes) for one in given[:2])
    axes = figures["detections"].axes
    assert sum(len(axis.patches) for axis in axes) == shown
    assert {text.get_text().split()[0] for axis in axes for text in axis.texts} == {
        NAMES[label] for one in given[:2] for label in one.classes
    }


def test_other_objectives_and_sources_without_objects_are_refused():
    with pytest.raises(ValueError, match="such as detection, and MAE does not"):
        DetectionAP().check_objective(MAE())
    with pytest.raises(ValueError, match="the source has no objects"):
        DetectionAP().check_data(Detection(), Given([]))


def test_crowds_alone_have_no_recall():
    given = objects(0)
    truth = Truth(NAMES)
    crowd = np.ones(len(given.boxes), bool)
    truth.add(0, (SIDE, SIDE), given._replace(crowd=crowd))
    with pytest.raises(ValueError, match="have no objects; want some"):
        scores(truth, [])


def test_classes_have_the_ap_whose_mean_is_the_whole():
    numbers, arrays = measured(0.1)
    for kind in ("box", "mask"):
        mean = np.nanmean(arrays[f"ap_{kind}_by_class"])
        assert mean == pytest.approx(numbers[f"ap_{kind}"].value, abs=1e-9)
    assert numbers["ap_box"].value < numbers["ap50_box"].value - 0.1


def square(side, at):
    mask = np.zeros((200, 200), bool)
    mask[at : at + side, at : at + side] = True
    return mask, [at, at, at + side, at + side]


@pytest.mark.parametrize("lost, word", list(enumerate(("small", "medium", "large"))))
def test_sizes_are_those_of_coco(lost, word):
    """Squares of 20, 60 and 100 pixels, one of which is not found."""
    masks, boxes = zip(square(20, 2), square(60, 30), square(100, 95), strict=True)
    given = Objects(
        boxes=np.array(boxes, np.float32),
        classes=np.zeros(3, np.int32),
        crowd=np.zeros(3, bool),
        areas=np.array([400.0, 3600.0, 10000.0]),
        segments=[runs_of(mask) for mask in masks],
        ids=[1, 2, 3],
    )
    truth = Truth(("a",))
    truth.add(0, (200, 200), given)
    scored = np.array([0.9, 0.8, 0.7], np.float32)
    full, valid = np.ones((3, 28, 28), np.float32), np.arange(3) != lost
    found = Found(given.boxes, scored, given.classes, valid, full)
    answers = answers_of(0, found, np.array([200, 200]), (200, 200))
    numbers, _ = scores(truth, answers)
    for kind in ("box", "mask"):
        low = [
            one
            for one in ("small", "medium", "large")
            if numbers[f"ap_{kind}_{one}"].value < 0.5
        ]
        assert low == [word]


def test_a_mask_is_as_large_as_its_pixels():
    """A small object, and before it a false alarm: a thin mask in a box of medium
    size, which counts among the small masks and not among the small boxes."""
    small, thin = np.zeros((2, 128, 128), bool)
    small[4:24, 4:24] = True
    thin[np.arange(60, 120), np.arange(60, 120)] = True
    box, whole = np.array([[4, 4, 24, 24]], np.float32), np.array([400.0])
    no, one = np.array([False]), np.array([0])
    truth = Truth(("a",))
    truth.add(0, (128, 128), Objects(box, one, no, whole, [runs_of(small)], [1]))

    def answer(mask, box, score):
        packed = encode(np.asfortranarray(mask.astype(np.uint8)))
        about = {"image_id": 0, "category_id": 1, "score": score}
        return about | {"bbox": box, "segmentation": packed}

    answers = [answer(thin, [60, 60, 60, 60], 0.9), answer(small, [4, 4, 20, 20], 0.5)]
    numbers, _ = scores(truth, answers)
    assert numbers["ap_mask_small"].value == pytest.approx(0.5, abs=0.01)
    assert numbers["ap_box_small"].value == pytest.approx(1)
