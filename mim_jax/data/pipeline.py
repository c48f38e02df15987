# SPDX-License-Identifier: Apache-2.0
"""From a source to the batches of one host: seeded and endless, or one padded pass.

Example i of a run is a pure function of (seed, i): step t reads examples t * batch to
(t + 1) * batch, and each host its own rows of them. So the step number is the whole
state of the data, and no number of hosts, workers or threads changes a byte.
"""

import dataclasses
import functools
import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from multiprocessing import resource_tracker
from typing import Any

import grain
import numpy as np
from absl import flags

from mim_jax.data import transforms
from mim_jax.data.randaugment import RandAugment
from mim_jax.data.sets import SETS
from mim_jax.data.sets.base import EvaluationSet
from mim_jax.data.sources.base import Source
from mim_jax.schema import free

Batch = dict[str, np.ndarray]
Example = dict[str, Any]  # one row of a batch
_SUBSTITUTES = 20  # tried before a run gives up on a record
_ENDLESS = 2**40  # steps
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Input:
    """Where images come from and how they are brought to the model's size.

    In memory at once: about workers x (2 x prefetch + 1) batches of this host, in
    shared memory (/dev/shm), or prefetch + 1 batches without workers.
    """

    source: Source
    image_size: tuple[int, int] = (224, 224)  # rows, columns
    crop_scale: tuple[float, float] = (0.2, 1.0)  # share of the image's area
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)  # width / height
    crop_retry: bool = True  # False: one draw, cut to the image, as BYOL
    crops: int = 1  # of an image: 1, or 2 for methods that compare two
    local_crops: int = 0  # further, smaller crops of an image
    local_size: tuple[int, int] = (96, 96)
    local_scale: tuple[float, float] = (0.05, 0.25)
    flip: bool = True  # left to right, one image of two
    randaugment: RandAugment = RandAugment()  # of every crop, after the flip
    eval_crop_fraction: float = 0.875  # 224 of 256
    workers: int = free(8)  # processes that read; 0: threads of this process
    threads: int = free(4)  # that read one batch together, in each process
    prefetch: int = free(2)  # batches held ready, per process
    max_replaced: float = 0.01  # largest share of undecodable images; above, stop

    def __post_init__(self):
        for name in ("image_size", "local_size"):
            size = getattr(self, name)
            if len(size) != 2 or min(size) < 1:
                raise ValueError(f"{name}={size}: want (rows, columns) >= 1")
        if self.crops not in (1, 2) or self.local_crops < 0:
            raise ValueError(
                f"crops={self.crops}, local_crops={self.local_crops}: want 1 or 2 "
                "crops and at least 0 local ones"
            )
        self.randaugment.check_channels(self.source.channels)
        tops = {"crop_scale": 1.0, "local_scale": 1.0, "crop_ratio": float("inf")}
        for name, top in tops.items():
            pair = getattr(self, name)
            if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= top:
                raise ValueError(f"{name}={pair}: want 0 < least <= greatest <= {top}")
        if not 0 < self.eval_crop_fraction <= 1:
            raise ValueError(
                f"eval_crop_fraction={self.eval_crop_fraction}: want 0 < it <= 1"
            )
        for name, least in (("workers", 0), ("threads", 1), ("prefetch", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name}={getattr(self, name)}: want {name} >= {least}"
                )
        if not 0 <= self.max_replaced <= 1:
            raise ValueError(f"max_replaced={self.max_replaced}: want 0 <= it <= 1")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Rows, columns and channels of every image of a batch."""
        return (*self.image_size, self.source.channels)

    @property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], type]]:
        """Shape and type of one row of what a training step may read."""
        shapes: dict[str, tuple[tuple[int, ...], type]] = {
            "image": (self.image_shape, np.uint8),
            "label": ((), np.int32),
        }
        if self.crops == 2:
            shapes["image2"] = shapes["image"]
        if self.local_crops:
            local = (self.local_crops, *self.local_size, self.source.channels)
            shapes["local"] = (local, np.uint8)
        return shapes

    def suffices(self, shape: tuple[int, int]) -> bool:
        """Whether every crop of an image of so many rows and columns has at least as
        many as the result: training decodes a large JPEG to no more than that."""
        crops = [(self.image_size, self.crop_scale)]
        if self.local_crops:
            crops.append((self.local_size, self.local_scale))
        for size, scale in crops:
            rows, cols = transforms.least_box(shape, scale, self.crop_ratio)
            if rows < size[0] or cols < size[1]:
                return False
        return True


def train_batches(
    data: Input,
    *,
    seed: int,
    batch_size: int,
    start: int = 0,
    stop: int | None = None,
    host: int = 0,
    hosts: int = 1,
    places: Sequence[int] | None = None,
) -> "Batches":
    """This host's rows of the training batches of steps `start`, `start + 1`, ...

    Records come in a new random order in every epoch, each once an epoch; a batch may
    span two epochs.

    Args:
        seed: of the order, the crops and the flips; 0 <= seed < 2**32.
        batch_size: of the GLOBAL batch, over all hosts.
        start, stop: first step, and the step before which to end (None: never).
        host, hosts: which part of each batch, of how many.
        places: instead, the rows of each batch that this host reads, in order.
    Returns:
        Iterator of batches; `b` = batch_size / hosts, everything a pure function of
        (seed, step, row): `image` uint8 (b, h, w, c); `label` int32 (b,), -1 if
        unknown; `index` int32 (b,), the record asked for; `replaced` bool (b,), True
        where that record could not be decoded and a substitute stands in; and, if the
        input has them, `image2` like `image`, a second crop, and `local` uint8
        (b, l, h', w', c), the local ones.
    Raises:
        ValueError: a number out of range.
    """
    rows = _rows(batch_size, host, hosts)
    if places is not None:
        rows = functools.partial(_places, batch_size, tuple(places))
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed}: want 0 <= seed < 2**32")
    stop = _ENDLESS if stop is None else stop
    if not 0 <= start <= stop:
        raise ValueError(f"start={start}, stop={stop}: want 0 <= start <= stop")
    examples = (
        grain.MapDataset.range(len(data.source))
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(functools.partial(_train_example, data))
    )
    read: Any = examples.__getitem__
    return _read(
        data, range(start, stop), functools.partial(_load, read, rows, data.threads)
    )


def eval_batches(
    data: Input,
    *,
    batch_size: int,
    host: int = 0,
    hosts: int = 1,
    source: Source | None = None,
) -> "Batches":
    """This host's rows of one pass over a source, in order, each record once.

    Args:
        batch_size: of the GLOBAL batch, over all hosts.
        host, hosts: which part of each batch, of how many; all hosts get the same
            number of batches.
        source: what to read; None: the held-out split of the training source.
    Returns:
        Iterator of batches as in training, without randomness, and `valid` bool (b,):
        False on the rows that fill the last batch (zeros, label and index -1) and on
        records that cannot be decoded (zeros, their index, `replaced` True).
    Raises:
        ValueError: a number out of range.
    """
    rows = _rows(batch_size, host, hosts)
    source = data.source.held_out() if source is None else source
    steps = range(-(-len(source) // batch_size))
    read = functools.partial(_eval_example, data, source)
    return _read(data, steps, functools.partial(_load, read, rows, data.threads))


@dataclasses.dataclass(frozen=True)
class EvalPasses:
    """Ordered passes over both splits of an input, for evaluations.

    Attributes:
        data: whose training source and held-out split are read.
        batch_size: images per batch.
    """

    data: Input
    batch_size: int = 64

    def train(self) -> "Batches":
        """One pass over the training images, without augmentation."""
        source = self.data.source
        return eval_batches(self.data, batch_size=self.batch_size, source=source)

    def held_out(self) -> "Batches":
        """One pass over the held-out images."""
        return eval_batches(self.data, batch_size=self.batch_size)

    def train_examples(self, indices: Sequence[int]) -> Batch:
        """Those training records as one batch."""
        source = self.data.source
        rows = [_eval_example(self.data, source, index) for index in indices]
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}

    def evaluation_set(self, entry: str) -> "SetPasses":
        """Images besides those of the source, by "NAME" or "NAME=FOLDER".

        Raises:
            ValueError: unknown name, or the set is not there or not whole.
        """
        name, _, folder = entry.partition("=")
        if name not in SETS:
            known = ", ".join(sorted(SETS))
            raise ValueError(f"set {name!r} is unknown; known: {known}")
        images = SETS[name](name, folder, self.data.source)
        return SetPasses(self.data, images, self.batch_size)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; () if unlabelled."""
        return self.data.source.classes


@dataclasses.dataclass(frozen=True)
class SetPasses:
    """Ordered passes over an evaluation set, its images as large as those of an input.

    Attributes:
        data: whose size and channels images are brought to.
        images: the set, whose attributes say what its labels mean.
        batch_size: images per batch.
    """

    data: Input
    images: EvaluationSet
    batch_size: int = 64

    def batches(self) -> "Batches":
        """One pass: `image`, `index`, `replaced` and `valid` as of `eval_batches`, and
        `labels` int32 (b, l), -1 where an image has fewer than the most."""
        rows = _rows(self.batch_size, 0, 1)
        steps = range(-(-len(self.images) // self.batch_size))
        read = functools.partial(_set_example, self.data, self.images)
        return _read(
            self.data, steps, functools.partial(_load, read, rows, self.data.threads)
        )


def check_replaced(replaced: int, seen: int, limit: float) -> None:
    """Stops a run that replaced too many of the images it has read.

    Raises:
        RuntimeError: replaced / seen > limit.
    """
    if replaced > limit * seen:
        raise RuntimeError(
            f"{replaced} of {seen} images ({replaced / seen:.2%}) could not be decoded,"
            f" more than data.max_replaced={limit:.2%}: check the data set, or raise"
            " config.data.max_replaced"
        )


class Batches:
    """Iterator of batches; `close` (or leaving a `with` block) stops its workers."""

    def __init__(self, dataset: grain.IterDataset, count: int):
        self._open, self._started = [iter(dataset)], False
        self._left = count
        # Closes also when it is forgotten, and before Python ends.
        self._close = weakref.finalize(self, _close, self._open)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __len__(self) -> int:
        """How many are left."""
        return self._left

    def __next__(self) -> Batch:
        if not self._open:
            raise ValueError("these batches are closed; ask for new ones")
        if not self._left:
            raise StopIteration
        self._left -= 1
        if self._started:
            return next(self._open[0])
        # Workers are born now, deaf: Ctrl-C and some schedulers signal all processes of
        # a group, and a worker that dies while it imports takes the trainer with it.
        resource_tracker.ensure_running()  # its start ends with all signals unblocked
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            return next(self._open[0])
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            self._started = True

    def close(self) -> None:
        """Stops the workers; calling it again does nothing."""
        self._close()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


def _close(iterators: list[Any]) -> None:
    while iterators:
        iterators.pop().close()  # and let go of it: Grain closes once more when freed


def _rows(batch_size: int, host: int, hosts: int) -> Callable[[int], Sequence[int]]:
    """The function from a step to the positions this host reads for it."""
    if not 0 <= host < hosts:
        raise ValueError(f"host={host}: want 0 <= host < hosts={hosts}")
    if batch_size < 1 or batch_size % hosts:
        raise ValueError(
            f"batch_size={batch_size}: want a multiple of the {hosts} hosts, >= 1"
        )
    return functools.partial(_positions, batch_size, batch_size // hosts, host)


def _positions(batch_size: int, share: int, host: int, step: int) -> range:
    first = step * batch_size + host * share
    return range(first, first + share)


def _places(batch_size: int, places: tuple[int, ...], step: int) -> list[int]:
    return [step * batch_size + place for place in places]


def _load(
    read: Callable[[int], Example],
    rows: Callable[[int], Sequence[int]],
    threads: int,
    step: int,
) -> Batch:
    """One batch. Threads read its rows side by side: decoders release the GIL."""
    positions = rows(step)
    batch: Batch = {}
    lock, left = threading.Lock(), iter(range(len(positions)))

    def fill(_) -> None:
        for row in left:
            example = read(positions[row])
            with lock:
                if not batch:
                    for key, value in example.items():
                        shape = (len(positions), *np.shape(value))
                        batch[key] = np.empty(shape, value.dtype)
            for key, value in example.items():
                batch[key][row] = value

    # Not a task for each row, nor a stack of all at last: that is a tenth of the time.
    with futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(fill, range(threads)))  # a list, so that errors are heard
    return batch


def _train_example(data: Input, index: int, rng: np.random.Generator) -> Example:
    image, label, replaced = _decoded(data.source, index, data.suffices)

    def crop(size, scale):
        ratio, retry = data.crop_ratio, data.crop_retry
        part = transforms.random_resized_crop(image, size, scale, ratio, rng, retry)
        part = transforms.flip(part, rng) if data.flip else part
        return data.randaugment(part, rng)

    first = crop(data.image_size, data.crop_scale)
    example = _example(first, label, index, replaced)
    if data.crops == 2:
        example["image2"] = crop(data.image_size, data.crop_scale)
    if data.local_crops:
        local = [
            crop(data.local_size, data.local_scale) for _ in range(data.local_crops)
        ]
        example["local"] = np.stack(local)
    return example


def _eval_example(data: Input, source: Source, position: int) -> Example:
    blank = np.zeros((*data.image_size, source.channels), np.uint8)
    if position >= len(source):
        return {**_example(blank, -1, -1, False), "valid": np.bool_(False)}
    record = source[position]
    image = _centre(data, record["image"], source.channels)
    if image is None:
        # Not replaced by another record: that one would count twice.
        example = _example(blank, record["label"], position, True)
        return {**example, "valid": np.bool_(False)}
    example = _example(image, record["label"], position, False)
    return {**example, "valid": np.bool_(True)}


def _set_example(data: Input, images: EvaluationSet, position: int) -> Example:
    image, index, labels = None, -1, np.full(images.labels, -1, np.int32)
    if position < len(images):
        index, record = position, images[position]
        given = record["labels"]
        if len(given) > images.labels:
            raise ValueError(
                f"image {position} has {len(given)} labels: want at most "
                f"{images.labels}"
            )
        labels[: len(given)] = given
        channels = data.source.channels
        image = _centre(data, record["image"], channels, images.border)
    valid = image is not None
    return {
        "image": np.zeros(data.image_shape, np.uint8) if image is None else image,
        "labels": labels,
        "index": np.int32(index),
        "replaced": np.bool_(index >= 0 and not valid),
        "valid": np.bool_(valid),
    }


def _centre(
    data: Input, image: bytes | np.ndarray, channels: int, border: int = 0
) -> np.ndarray | None:
    """What evaluation sees of a stored image; None if it cannot be decoded."""
    try:
        pixels = transforms.decode(image, channels)
    except transforms.Undecodable:
        return None
    if border:
        pixels = pixels[border:-border, border:-border]
    return transforms.centre_crop(pixels, data.image_size, data.eval_crop_fraction)


def _example(image: np.ndarray, label: int, index: int, replaced: bool) -> Example:
    numbers = {"label": np.int32(label), "index": np.int32(index)}
    return {"image": image, **numbers, "replaced": np.bool_(replaced)}


def _decoded(
    source: Source, index: int, suffices: Callable[[tuple[int, int]], bool]
) -> tuple[np.ndarray, int, bool]:
    """Record `index`, or the first sound one of its substitutes."""
    tried = []
    for candidate in _candidates(index, source):
        record = source[candidate]
        try:
            image = transforms.decode(record["image"], source.channels, suffices)
        except transforms.Undecodable as error:
            tried.append(f"{candidate} ({error})")
            continue
        return image, record["label"], bool(tried)
    raise RuntimeError(
        f"record {index} and its {_SUBSTITUTES} substitutes cannot be decoded; check"
        f" the data set: {'; '.join(tried)}"
    )


def _candidates(index: int, source: Source) -> Iterator[int]:
    yield index
    # Drawn from the index alone: the same substitutes in every epoch and every run.
    rng = np.random.default_rng(index)
    yield from rng.integers(len(source), size=_SUBSTITUTES).tolist()


def _read(data: Input, steps: range, load: Callable) -> Batches:
    """Reads `load(step)` ahead, in worker processes or in a thread of this one."""
    # Endless to Grain, and counted by us: at an end, Grain leaves frames that hold each
    # other and the last batch. Freed by the garbage collector, shared memory is closed
    # twice at times.
    batches = grain.MapDataset.range(steps.start, _ENDLESS).map(load)
    if not data.workers:
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=data.prefetch)
        return Batches(batches.to_iter_dataset(ahead), len(steps))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # in a notebook; Grain reads one of its own flags
    # Worker w of n loads whole batches w, w + n, ...: one at a time, so that closing
    # never waits for more than that.
    now = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    many = grain.MultiprocessingOptions(
        num_workers=data.workers, per_worker_buffer_size=data.prefetch
    )
    return Batches(
        batches.to_iter_dataset(now).mp_prefetch(many, worker_init_fn=_start_worker),
        len(steps),
    )


def _start_worker(worker: int, workers: int) -> None:
    del worker, workers
    # The trainer decides when to stop: it saves first.
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # A worker never needs an accelerator, and must not take it from the trainer.
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:  # came with Grain, and has read the variable already
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    # Grain's workers outlive a trainer that is killed, waiting on a queue forever.
    threading.Thread(target=_follow_parent, name="follow-parent", daemon=True).start()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
