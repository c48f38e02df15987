# SPDX-License-Identifier: Apache-2.0
"""Reads batches ahead of time, in worker processes or in threads of this process."""

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

from mim_jax.data.fields import Example, Fields
from mim_jax.data.input import Input

Batch = dict[str, np.ndarray]
ENDLESS = 2**40  # steps
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Batches:
    """Iterator of batches; `close` (or leaving a `with` block) stops its workers."""

    def __init__(self, dataset: grain.IterDataset, count: int):
        self._open, self._started = [iter(dataset)], False
        self._left = count
        # Closes too when nobody holds this object any more, and before Python ends.
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
        # This starts the workers, with signals blocked. Ctrl-C and some schedulers
        # signal all processes of a group, and a worker that dies while it imports
        # takes the trainer with it.
        resource_tracker.ensure_running()  # else starting it unblocks all signals
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


def read_ahead(
    read: Callable[[int], Example],
    fields: Fields,
    positions: Callable[[int], Sequence[int]],
    steps: range,
    data: Input,
) -> Batches:
    """The batches of some steps, read ahead.

    Args:
        read: gives the example at a position; it travels to worker processes.
        fields: what these examples have.
        positions: gives, for a step, the position of each row of its batch.
        steps: consecutive steps.
        data: how many workers and threads read, and how many batches are held ready.
    """
    load = functools.partial(_load, read, fields, positions, data.threads)
    # Grain gets an endless data set and `Batches` counts. At an end, Grain leaves
    # frames that refer to each other and to the last batch; when the garbage collector
    # frees them, shared memory is sometimes closed twice.
    batches = grain.MapDataset.range(steps.start, ENDLESS).map(load)
    if not data.processes:
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=data.prefetch)
        return Batches(batches.to_iter_dataset(ahead), len(steps))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # in a notebook; Grain reads one of its own flags
    # Worker w of n loads whole batches w, w + n, ..., one at a time, so that closing
    # never waits for more than one.
    now = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    many = grain.MultiprocessingOptions(
        num_workers=data.processes, per_worker_buffer_size=data.prefetch
    )
    return Batches(
        batches.to_iter_dataset(now).mp_prefetch(many, worker_init_fn=_start_worker),
        len(steps),
    )


def _load(
    read: Callable[[int], Example],
    fields: Fields,
    positions: Callable[[int], Sequence[int]],
    threads: int,
    step: int,
) -> Batch:
    """One batch. Threads read its rows side by side: decoders release the GIL."""
    places = positions(step)
    batch = {
        name: np.empty((len(places), *field.shape), field.dtype)
        for name, field in fields.items()
    }
    left = iter(range(len(places)))

    def fill(_) -> None:
        for row in left:
            for name, value in read(places[row]).items():
                batch[name][row] = value

    # One task per thread and no stack of rows at the end: a task per row and the stack
    # would take a tenth of the time.
    with futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(fill, range(threads)))  # a list, so that errors are raised here
    return batch


def _close(iterators: list[Any]) -> None:
    # The iterator leaves the list, so that it is freed: Grain closes it once more then.
    while iterators:
        iterators.pop().close()


def _start_worker(worker: int, workers: int) -> None:
    del worker, workers
    # The trainer decides when to stop: it saves first.
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # A worker never needs an accelerator, and must not take it from the trainer.
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:  # Grain imported it, and it has read the variable already
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    # Without this, workers of a trainer that is killed wait on a queue forever.
    threading.Thread(target=_follow_parent, name="follow-parent", daemon=True).start()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
