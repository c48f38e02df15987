# SPDX-License-Identifier: Apache-2.0
"""From JPEG files to augmented uint8 batches, beside torchvision and tf.data.

python benchmarks/input.py --rounds=7

Needs torch, torchvision and TensorFlow (pip install torch torchvision tensorflow-cpu);
one that is not installed is left out, and said so. 2,000 crops of 500 x 375 pixels of
the embedded photographs are written as JPEGs of quality 90 into a temporary folder.
From these, each contender makes batches of 100 images of 224 x 224 pixels in random
order: a box of RandomResizedCrop (20 to 100 % of the area), bicubic resize, a flip of
half of them, uint8. They take turns, each time in a process of its own on the cores it
may use: on one core without workers, and with two workers, on two. Prints a table of
the medians, with the time of the processor too where one process does all, since that
is disturbed less by other work.

torchvision: ImageFolder with Pillow, in a DataLoader. tf.data: decode_and_crop_jpeg and
tf.image.resize, once as it is by default, where a photograph that shrinks is not
antialiased, and once antialiased as ours and torchvision's are.

--stall trains a small autoencoder on the same files, one worker beside it, and prints
what share of each ten steps the trainer waited for images.
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from mim_jax.data.input import Input
from mim_jax.data.pipeline import train_batches
from mim_jax.data.sources import photos
from mim_jax.data.sources.folder import Folder
from mim_jax.data.workers import Batches

COUNT, BATCH, SIDE = 2000, 100, 224
SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
ROWS, COLS = 375, 500
MEASURE = "--measure"


def write_jpegs(folder: pathlib.Path) -> None:
    """`folder`/train/photographs and a few in `folder`/val/photographs."""
    rng = np.random.default_rng(0)
    for split, names, count in (
        ("train", photos.TRAIN + photos.HELD_OUT, COUNT),
        ("val", photos.HELD_OUT, BATCH),
    ):
        pictures = [Image.open(photos.locate(name)).convert("RGB") for name in names]
        large = [x for x in pictures if x.width >= COLS and x.height >= ROWS]
        (folder / split / "photographs").mkdir(parents=True)
        for number in range(count):
            picture = large[number % len(large)]
            left = int(rng.integers(picture.width - COLS + 1))
            top = int(rng.integers(picture.height - ROWS + 1))
            crop = picture.crop((left, top, left + COLS, top + ROWS))
            crop.save(folder / split / "photographs" / f"{number:04}.jpg", quality=90)


def ours(folder: str, workers: int) -> Iterator:
    data = Input(
        source=Folder(path=folder),
        image_size=(SIDE, SIDE),
        crop_scale=SCALE,
        crop_ratio=RATIO,
        workers=workers,
        threads=1,
    )
    return train_batches(data, seed=0, batch_size=BATCH)


def torchvision(folder: str, workers: int) -> Iterator:
    import torch
    from torchvision import datasets, transforms

    torch.set_num_threads(1)
    recipe = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                SIDE, SCALE, RATIO, transforms.InterpolationMode.BICUBIC
            ),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )
    loader = torch.utils.data.DataLoader(
        datasets.ImageFolder(f"{folder}/train", recipe),
        batch_size=BATCH,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))


def tf_data(folder: str, workers: int, antialias: bool = False) -> Iterator:
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf

    def load(path):
        data = tf.io.read_file(path)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(data),
            tf.zeros([0, 0, 4], tf.float32),
            area_range=SCALE,
            aspect_ratio_range=RATIO,
            min_object_covered=0.0,
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        box = tf.concat([begin[:2], size[:2]], axis=0)
        image = tf.io.decode_and_crop_jpeg(data, box, channels=3)
        image = tf.image.resize(image, (SIDE, SIDE), "bicubic", antialias=antialias)
        image = tf.image.random_flip_left_right(image)
        return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)

    threads = max(workers, 1)
    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    files = sorted(map(str, pathlib.Path(folder).glob("train/*/*.jpg")))
    dataset = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files)).repeat()
    dataset = dataset.map(load, num_parallel_calls=threads).batch(BATCH).prefetch(2)
    return iter(dataset.with_options(options))


def tf_data_antialiased(folder: str, workers: int) -> Iterator:
    return tf_data(folder, workers, antialias=True)


CONTENDERS = {
    "mim_jax": (ours, "grain"),
    "torchvision": (torchvision, "torchvision"),
    "tf.data": (tf_data, "tensorflow"),
    "tf.data, antialiased": (tf_data_antialiased, "tensorflow"),
}


def measure(name: str, folder: str, workers: int) -> None:
    """Prints the images a second of this process, by the clock and the processor."""
    cores = sorted(os.sched_getaffinity(0))[: max(workers, 1)]
    os.sched_setaffinity(0, cores)  # before a library counts them
    batches = CONTENDERS[name][0](folder, workers)
    # Beyond what is held ready at first: 2 batches, or 5 for each worker.
    for _ in range(4 + 6 * workers):
        next(batches)
    before = time.perf_counter(), time.process_time()
    for _ in range(COUNT // BATCH):
        next(batches)
    after = time.perf_counter(), time.process_time()
    print(json.dumps([COUNT / (b - a) for a, b in zip(before, after, strict=True)]))
    if isinstance(batches, Batches):
        batches.close()


def compare(folder: str, rounds: int) -> None:
    found: dict[tuple[str, int], list[list[float]]] = {}
    names = {}
    for name, (_, package) in CONTENDERS.items():
        if importlib.util.find_spec(package) is None:
            print(f"{name} is left out: {package} is not installed", file=sys.stderr)
        else:
            names[name] = package
    for _, workers, name in itertools.product(range(rounds), (0, 2), names):
        command = [sys.executable, __file__, f"{MEASURE}={name}", f"--folder={folder}"]
        command.append(f"--workers={workers}")
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        rates = json.loads(done.stdout.splitlines()[-1])
        found.setdefault((name, workers), []).append(rates)
    print(
        "| images a second | one core | ours over it | one core, processor "
        "| ours over it | two workers | ours over it |"
    )
    print("|---|---|---|---|---|---|---|")
    middle = {
        key: [statistics.median(rates) for rates in zip(*values, strict=True)]
        for key, values in found.items()
    }
    for name in names:
        cells = [name]
        for workers, clock in ((0, 0), (0, 1), (2, 0)):
            mine, theirs = (middle[one, workers][clock] for one in ("mim_jax", name))
            cells += [f"{theirs:.0f}", f"{mine / theirs:.2f}"]
        print(f"| {' | '.join(cells)} |")
    packages = {*names.values(), "simplejpeg", "cykooz-resizer", "pillow"}
    versions = {name: importlib.metadata.version(_installed(name)) for name in packages}
    print(json.dumps({"rounds": rounds, "versions": versions}))


def _installed(package: str) -> str:
    found = importlib.metadata.packages_distributions().get(package)
    return found[0] if found else package


def stall(folder: str) -> None:
    """Trains 100 steps whose time is some times that of their images."""
    with tempfile.TemporaryDirectory() as workdir:
        settings: dict[str, Any] = {
            "steps": 100,
            "batch_size": 32,
            "data.source.path": folder,
            "data.workers": 1,
            "data.threads": 1,
            "log.every": 10,
            "log.progress": "none",
            "objective.encoder.patch": 32,
            "objective.encoder.width": 128,
            "objective.encoder.depth": 4,
            "objective.encoder.heads": 4,
            "objective.decoder.width": 96,
            "objective.decoder.depth": 2,
            "objective.decoder.heads": 4,
        }
        command = [sys.executable, "-m", "mim_jax.main", f"--workdir={workdir}"]
        command.append("--config=configs/mae.py:source=folder")
        command += [f"--config.{name}={value}" for name, value in settings.items()]
        print(" ".join(command), flush=True)
        root = pathlib.Path(__file__).parents[1]
        subprocess.run(command, check=True, cwd=root, stdout=subprocess.DEVNULL)
        lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    print("| step | images a second | share of the time that images were waited for |")
    print("|---|---|---|")
    for line in map(json.loads, lines):
        if "input_wait_share" in line:
            rate, share = line["images_per_second"], line["input_wait_share"]
            print(f"| {line['step']} | {rate:.0f} | {share:.4f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--stall", action="store_true")
    parser.add_argument(
        "--folder", help="of an earlier run's JPEGs; else they are made"
    )
    parser.add_argument(MEASURE, choices=CONTENDERS, help="one contender, by itself")
    parser.add_argument("--workers", type=int, default=0, help=f"with {MEASURE}")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = arguments.folder or made
        if not arguments.folder:
            write_jpegs(pathlib.Path(folder))
        if arguments.measure:
            measure(arguments.measure, folder, arguments.workers)
        elif arguments.stall:
            stall(folder)
        else:
            compare(folder, arguments.rounds)


if __name__ == "__main__":
    main()
