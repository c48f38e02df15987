# SPDX-License-Identifier: Apache-2.0
"""How well objects are found: average precision of boxes and masks, by pycocotools."""

import contextlib
import dataclasses
import io
from collections.abc import Iterable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mim_jax.evals.base import Eval, Headline, Passes, Run
from mim_jax.evals.figures import Panel, gallery, one_per_run
from mim_jax.evals.images import valid_images
from mim_jax.evals.report import Number, Report
from mim_jax.objectives.base import Detector, Objective
from mim_jax.ops.roi import paste_weights
from mim_jax.schema import check_ranges, within

KINDS = {"box": "bbox", "mask": "segm"}
# The first numbers of pycocotools' summary, in its order.
_SUMMARY = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
_RECALL = 8  # place of the recall with the most answers

Entry = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectionAP(Eval):
    """Average precision (AP) of boxes and masks on held-out images, arXiv:1405.0312.

    The means over overlaps from .5 to .95 are `ap_box` and `ap_mask`; crowds count as
    COCO has it. Masks are measured at the resolution of the picture. Where no object
    has a mask, only boxes are measured.

    Attributes:
        images: held-out images that are measured; None: all.
        shown: images in the picture.
        least: score from which an answer is in the picture.
    """

    description: ClassVar[str] = (
        "How well objects in held-out images are found: average precision of boxes and "
        "of masks, as COCO measures it, for all objects and for each class."
    )
    headlines: ClassVar[tuple[Headline, ...]] = (
        Headline(
            "ap_box",
            "AP, boxes",
            "share",
            "higher",
            "Average precision of the boxes, a mean over classes and over the overlaps "
            "from .5 to .95 that a hit must have.",
        ),
        Headline(
            "ap_mask",
            "AP, masks",
            "share",
            "higher",
            "The same for masks, whose pixels must overlap.",
        ),
    )

    images: int | None = within(None, least=1, most=2**31 - 1)
    shown: int = within(8, least=1, most=1000)
    least: float = within(0.5, least=0, most=1)

    def __post_init__(self):
        check_ranges(self)

    def check_objective(self, objective: Objective) -> None:
        if not isinstance(objective, Detector):
            raise ValueError(
                f"detection needs an objective that finds objects, such as detection, "
                f"and {type(objective).__name__} does not"
            )

    def check_data(self, objective: Objective, data: Passes) -> None:
        del objective
        _tools()
        if not data.object_classes:
            raise ValueError(
                "detection: the source has no objects; want one whose images have, "
                "such as scenes or coco"
            )

    def measure(self, run: Run, data: Passes) -> Report:
        objective: Any = run.objective
        detect = jax.jit(objective.detect)
        truth, answers, pictures = Truth(data.object_classes), [], []
        with data.held_out() as batches:
            for batch, rows in valid_images(batches, "detection", self.images):
                given = (jnp.asarray(batch[name]) for name in ("image", "size"))
                found = jax.device_get(detect(run.params, *given))
                lost = ~np.isfinite(found.scores[rows]).all(axis=1)
                if lost.any():
                    raise ValueError(
                        f"detection: scores of {lost.sum()} of {len(rows)} images are "
                        "not finite; want a run whose parameters are sound"
                    )
                for row in rows.tolist():
                    shape = tuple(batch["shape"][row].tolist())
                    index = int(batch["index"][row])
                    truth.add(index, shape, data.objects("held_out", index, shape))
                    one = jax.tree.map(lambda leaf, row=row: leaf[row], found)
                    answers += answers_of(index, one, batch["size"][row], shape)
                    if len(pictures) < self.shown:
                        pictures.append((batch["image"][row], one))
        numbers, arrays = scores(truth, answers)
        numbers["images"] = Number(len(truth.images), "images")
        numbers["objects"] = Number(len(truth.annotations), "objects")
        names = np.array([*data.object_classes])
        arrays |= {"class_names": names} | self._pictures(pictures, names)
        return Report(numbers=numbers, arrays=arrays)

    def _pictures(self, pictures: list, names: np.ndarray) -> dict[str, np.ndarray]:
        images, found = zip(*pictures, strict=True)
        # NaN is below any `least`, 0 is not.
        scores = np.stack([np.where(one.valid, one.scores, np.nan) for one in found])
        return {
            "images": np.stack(images),
            "boxes": np.stack([one.boxes for one in found]),
            "scores": scores,
            "masks": np.stack([one.masks > 0.5 for one in found]),
            "found": names[np.stack([one.classes for one in found]) % len(names)],
        }

    def draw(self, found: dict[str, Report]) -> dict[str, Figure]:
        tables = {"classes": _by_class(found)}

        def pictures(name: str, report: Report) -> Figure:
            return _gallery(name, report, self.least)

        return tables | one_per_run("detections", found, pictures)


class Truth:
    """What images show, in pycocotools' form.

    Attributes:
        images, annotations: its entries.
        names: of the classes; class i has the category id i + 1.
    """

    def __init__(self, names: tuple[str, ...]):
        self.names = names
        self.images: list[Entry] = []
        self.annotations: list[Entry] = []

    def add(self, index: int, shape: tuple[int, int], objects: Any) -> None:
        """Adds an image.

        Args:
            index: of its record.
            shape: rows and columns of the picture.
            objects: a `mim_jax.data.segments.Objects`.
        """
        self.images.append({"id": index, "height": shape[0], "width": shape[1]})
        for number, box in enumerate(np.asarray(objects.boxes, np.float64)):
            self.annotations.append(
                {
                    "id": len(self.annotations) + 1,  # pycocotools reads 0 as none
                    "image_id": index,
                    "category_id": int(objects.classes[number]) + 1,
                    "bbox": [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()],
                    "area": float(objects.areas[number]),
                    "iscrowd": int(objects.crowd[number]),
                    "segmentation": objects.segments[number],
                }
            )

    def coco(self, kind: str) -> Any:
        """A pycocotools.coco.COCO; of masks, with the objects that have one."""
        coco, _ = _tools()
        entries = [
            dict(one)  # pycocotools writes into them
            for one in self.annotations
            if kind == "box" or one["segmentation"]
        ]
        found = coco.COCO()
        found.dataset = {
            "info": {},
            "images": list(self.images),
            "annotations": entries,
            "categories": [
                {"id": i + 1, "name": name} for i, name in enumerate(self.names)
            ],
        }
        with _silent():
            found.createIndex()
        return found


def answers_of(
    index: int, found: Any, size: np.ndarray, shape: tuple[int, int]
) -> list[Entry]:
    """The answers for an image as pycocotools reads them.

    Args:
        index: of its record.
        found: a `Found` of this image alone.
        size: rows and columns of the picture in the image of the network.
        shape: rows and columns of the picture itself.
    """
    from pycocotools import mask as packed

    down, across = shape[0] / float(size[0]), shape[1] / float(size[1])
    entries = []
    for place in np.flatnonzero(found.valid):
        box = found.boxes[place].astype(np.float64) * (across, down, across, down)
        mask = pasted(found.masks[place], box, shape)
        runs = packed.encode(np.asfortranarray(mask.astype(np.uint8)))
        entries.append(
            {
                "image_id": index,
                "category_id": int(found.classes[place]) + 1,
                "bbox": [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()],
                "score": float(found.scores[place]),
                "segmentation": runs,
            }
        )
    return entries


def pasted(mask: np.ndarray, box: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A mask of a box as a mask of the whole picture: where it is at least one half.

    Args:
        mask: 0..1, float32.
        box: left, top, right, bottom in pixels of the picture.
    """
    whole = np.zeros(shape, bool)
    first = np.maximum(np.floor(box[:2]).astype(int) - 1, 0)
    last = np.ceil(box[2:]).astype(int) + 1
    cols, rows = np.minimum(last, (shape[1], shape[0])) - first
    if min(rows, cols) > 0:
        left, top = first.tolist()
        y = paste_weights(box[1] - top, box[3] - top, int(rows), mask.shape[0], np)
        x = paste_weights(box[0] - left, box[2] - left, int(cols), mask.shape[1], np)
        whole[top : top + rows, left : left + cols] = y @ mask @ x.T >= 0.5
    return whole


def scores(
    truth: Truth, answers: list[Entry]
) -> tuple[dict[str, Number], dict[str, np.ndarray]]:
    """What pycocotools says of answers, as numbers; and the AP of each class.

    Numbers of which there is no object, such as large ones, are left out.
    """
    numbers, arrays = {}, {}
    count = len(truth.images)
    for kind, word in KINDS.items():
        known = truth.coco(kind)
        if not known.dataset["annotations"]:
            continue
        stats, precision = _evaluated(known, answers, word)
        for key, value in zip(_SUMMARY, stats, strict=False):
            if value >= 0:
                numbers[_name(key, kind)] = Number(float(value), "share", count)
        if stats[_RECALL] >= 0:
            recall = Number(float(stats[_RECALL]), "share", count)
            numbers[f"recall_{kind}"] = recall
        arrays[f"ap_{kind}_by_class"] = precision
    if not numbers:
        raise ValueError("detection: the held-out images have no objects; want some")
    return numbers, arrays


def _name(key: str, kind: str) -> str:
    """`ap_box`, `ap50_box`, `ap_box_small`."""
    first, _, size = key.partition("_")
    return f"{first}_{kind}" + (f"_{size}" if size else "")


def _evaluated(known: Any, answers: list[Entry], word: str):
    """pycocotools' summary, and the AP of each class, NaN of a class without
    objects."""
    _, cocoeval = _tools()
    with _silent():
        if answers:
            # With a box, pycocotools would take its area for that of the mask.
            left_out = "bbox" if word == "segm" else ""
            found = known.loadRes(
                [{k: v for k, v in one.items() if k != left_out} for one in answers]
            )
        else:  # which pycocotools cannot read
            found = Truth(()).coco("box")
        run = cocoeval.COCOeval(known, found, word)
        run.params.imgIds = sorted(one["id"] for one in known.dataset["images"])
        run.evaluate()
        run.accumulate()
        run.summarize()
    precision = run.eval["precision"][:, :, :, 0, -1]  # overlap, recall, class
    by_class = np.where(precision >= 0, precision, np.nan)
    empty = np.isnan(by_class).all(axis=(0, 1))
    means = np.where(empty, 0, by_class).mean(axis=(0, 1))
    return run.stats, np.where(empty, np.nan, means)


def _tools() -> tuple[Any, Any]:
    try:
        from pycocotools import coco, cocoeval
    except ModuleNotFoundError as error:
        raise ValueError(
            "detection measures with pycocotools, which is not installed: "
            "pip install -e '.[detection]'"
        ) from error
    return coco, cocoeval


def _silent() -> contextlib.AbstractContextManager:
    """pycocotools prints as it goes."""
    return contextlib.redirect_stdout(io.StringIO())


def _by_class(found: dict[str, Report]) -> Figure:
    """A table: the AP of each class, in percent, by run and kind."""
    first = next(iter(found.values())).arrays
    names = first["class_names"].tolist()
    columns, cells = [], [[] for _ in names]
    for run, report in found.items():
        for kind in KINDS:
            if f"ap_{kind}_by_class" not in report.arrays:
                continue
            columns.append(f"{run}\n{kind}" if len(found) > 1 else f"AP {kind}")
            for row, value in zip(
                cells, report.arrays[f"ap_{kind}_by_class"], strict=True
            ):
                row.append("-" if np.isnan(value) else f"{100 * value:.1f}")
    size = (2 + 1.3 * len(columns), 0.8 + 0.22 * len(names))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    axis = figure.subplots()
    axis.set_axis_off()
    table = axis.table(cells, rowLabels=names, colLabels=columns, loc="center")
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    axis.set_title("AP of each class, %: higher is better", fontsize=8)
    return figure


def _gallery(name: str, report: Report, least: float) -> Figure:
    """Images with the boxes and masks that were found, and their classes."""
    arrays = report.arrays
    panels = []
    for number, image in enumerate(arrays["images"]):
        keep = arrays["scores"][number] >= least
        parts = (arrays[key][number][keep] for key in ("boxes", "masks", "found"))
        marks = list(zip(*parts, arrays["scores"][number][keep], strict=True))
        panels.append(Panel(image, overlay=_marks(marks, image.shape[:2])))
    title = f"{name}: objects found with a score of at least {least:g}"
    return gallery(panels, 4, (2.4, 2.4), title)


def _marks(marks: Iterable[tuple], shape: tuple[int, int]):
    def draw(axis: Any) -> None:
        for number, (box, mask, word, score) in enumerate(marks):
            colour = f"C{number % 10}"
            place = box[:2] - 0.5
            width, height = box[2:] - box[:2]
            frame = Rectangle(tuple(place), width, height, fill=False, edgecolor=colour)
            axis.add_patch(frame)
            inside = pasted(mask.astype(np.float32), box.astype(np.float64), shape)
            veil = np.zeros((*shape, 4))
            veil[inside] = (*_rgb(colour), 0.45)
            axis.imshow(veil, interpolation="nearest")
            text = f"{word} {100 * score:.0f}"
            label = dict(fontsize=6, color="white", va="bottom")
            ground = dict(facecolor=colour, edgecolor="none", pad=0.5)
            axis.text(*place, text, bbox=ground, **label)

    return draw


def _rgb(colour: str) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    return to_rgb(colour)
