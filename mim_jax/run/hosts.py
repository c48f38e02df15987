# SPDX-License-Identifier: Apache-2.0
"""What the hosts of a run tell each other, and how long one waits for the others."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

EXIT_LOST = 6  # the others, or the disk of this host, did not answer in time
PATIENCE = 3600  # seconds; hosts start, compile and read at different speeds
REPORT = 24 * 3600  # seconds that the others wait while the first host measures


@contextlib.contextmanager
def deadline(what: str, seconds: int | float | None = None) -> Iterator[None]:
    """Of several hosts, ends this process with EXIT_LOST if the block takes too long.

    Nothing else would end the wait for a host that is alive and does not answer. A
    host that dies is no such case: JAX ends the others.

    Args:
        what: is waited for, for the message.
        seconds: PATIENCE, unless given.
    """
    if jax.process_count() == 1:
        yield
        return
    seconds = PATIENCE if seconds is None else seconds
    timer = threading.Timer(seconds, _give_up, (what, seconds))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _give_up(what: str, seconds: int | float) -> None:
    sys.stdout.flush()
    print(
        f"error: host {jax.process_index()} of {jax.process_count()} waited "
        f"{seconds:g} s for {what}: another host hangs, or a disk of this one. Look at "
        "what the other hosts said; the same command goes on from the newest "
        "checkpoint",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_LOST)  # the thread that waits cannot be stopped


def from_hosts(number: int, what: str = "a number") -> list[int]:
    """The number that each host passed; all hosts must call this at the same point.

    Args:
        what: it is, for the message of a host that waits in vain.
    """
    return _gathered(np.int32(number), what).tolist()


def from_first_host(numbers: list[int], what: str = "numbers") -> list[int]:
    """The numbers that the first host passed; all hosts must call this at the same
    point. `what` is as for `from_hosts`."""
    count = from_hosts(len(numbers), what)[0]
    if not count:
        return []
    padded = np.resize(np.asarray(numbers, np.int32), count)
    return _gathered(padded, what)[0].tolist()


def texts_of_hosts(text: str) -> list[str]:
    """The text that each host passed; all hosts must call this at the same point."""
    row = np.array(list(map(ord, text)), np.int32)
    sizes = from_hosts(len(row), "a text")
    rows = _gathered(np.resize(row, max(sizes)), "a text").tolist()
    return [
        "".join(map(chr, row[:size])) for row, size in zip(rows, sizes, strict=True)
    ]


def _gathered(row: np.ndarray | np.int32, what: str) -> np.ndarray:
    """The arrays that the hosts passed, all of one shape, one after the other."""
    if jax.process_count() == 1:
        return np.asarray(row)[None]
    with deadline(f"{what} from all hosts"), jax.transfer_guard("allow"):
        return np.asarray(multihost_utils.process_allgather(row))
