# SPDX-License-Identifier: Apache-2.0
"""Writes the scenes in COCO's form, for programs that read that.

    python -m mim_jax.data.coco --to=FOLDER [--images=N] [--held_out_images=N]

The source `coco` reads the folder: --config=configs/detect.py:source=coco
"""

import argparse
import json
import pathlib
import sys
from typing import Any

from PIL import Image

from mim_jax.data.decoding import decode
from mim_jax.data.segments import objects_of
from mim_jax.data.sources.base import Source
from mim_jax.data.sources.scenes import Scenes

FOLDERS = {"train": "train2017", "held_out": "val2017"}


def write(source: Source, folder: pathlib.Path) -> dict[str, int]:
    """Writes both splits of a source whose records have objects.

    Args:
        source: its training split.
        folder: made if absent; it must not have annotations yet.
    Returns:
        Number of images by split.
    Raises:
        ValueError: the folder has annotations already.
    """
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    counts = {}
    for split, name in FOLDERS.items():
        file = folder / "annotations" / f"instances_{name}.json"
        if file.exists():
            raise ValueError(f"{file} exists: name another --to, or remove it first")
        part = source if split == "train" else source.held_out()
        (folder / name).mkdir(exist_ok=True)
        found = _written(part, folder / name)
        partial = file.with_suffix(".incomplete")
        partial.write_text(json.dumps(found, allow_nan=False))
        partial.rename(file)  # a file that is there is whole
        counts[split] = len(found["images"])
    return counts


def _written(source: Source, folder: pathlib.Path) -> dict[str, list[Any]]:
    """Writes the images of a split as PNG; returns its JSON."""
    images, annotations = [], []
    for index in range(len(source)):
        record = source[index]
        pixels = decode(record["image"], source.channels)
        rows, cols = pixels.shape[:2]
        name = f"{index:012}.png"
        Image.fromarray(pixels.squeeze()).save(folder / name)
        one = {"id": index + 1, "file_name": name, "height": rows, "width": cols}
        images.append(one)
        objects = objects_of(record, (rows, cols))
        for number in range(len(objects.boxes)):
            left, top, right, bottom = objects.boxes[number].tolist()
            entry = {
                "id": len(annotations) + 1,
                "image_id": index + 1,
                "category_id": int(objects.classes[number]) + 1,
                "bbox": [left, top, right - left, bottom - top],
                "area": float(objects.areas[number]),
                "iscrowd": int(objects.crowd[number]),
            }
            if objects.segments[number] is not None:
                entry["segmentation"] = objects.segments[number]
            annotations.append(entry)
    names = source.object_classes
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    return {"images": images, "annotations": annotations, "categories": categories}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mim_jax.data.coco", description="Write the scenes as COCO does."
    )
    parser.add_argument("--to", required=True, help="folder to write")
    parser.add_argument("--images", type=int, default=Scenes().images)
    parser.add_argument("--held_out_images", type=int, default=Scenes().held_out_images)
    given = parser.parse_args(words)
    try:
        source = Scenes(images=given.images, held_out_images=given.held_out_images)
        counts = write(source, pathlib.Path(given.to).expanduser())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for split, count in counts.items():
        print(f"{split}: {count} images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
