# SPDX-License-Identifier: Apache-2.0
"""Leaving in good order: SIGTERM and SIGINT ask, the training loop answers."""

import concurrent.futures
import os
import signal
from collections.abc import Callable
from typing import TypeVar

import jax
from jax.experimental import multihost_utils

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: saved, the same command goes on

_T = TypeVar("_T")


class Interrupted(Exception):
    """The run was asked to leave, and nothing that it did is lost."""


class Interrupts:
    """Turns SIGTERM and SIGINT into a flag; a second one ends the process at once,
    with 128 + its number.

    With several hosts all must leave at the same step, so there JAX's preemption
    service owns SIGTERM and tells every host which step that is; SIGINT just ends one,
    and the others with it.
    """

    def __enter__(self) -> "Interrupts":
        # Not a threading.Event: a handler must not take a lock.
        self._asked = False
        self._steps = 0
        several = jax.process_count() > 1
        owned = () if several else (signal.SIGINT, signal.SIGTERM)
        self._before = {name: signal.signal(name, self._ask) for name in owned}
        return self

    def __exit__(self, *exc) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def asked(self, step: int) -> bool:
        """True if the run should save and leave after `step` steps."""
        if jax.process_count() > 1:
            # Counted from this start: JAX settles on the step after the last one that
            # it was told of, and before the first that is 1, also for a resumed run.
            self._steps += 1
            return multihost_utils.reached_preemption_sync_point(self._steps)
        return self._asked

    def patiently(self, work: Callable[[], _T]) -> _T:
        """The result of long work that leaves nothing behind, such as compiling. It
        runs in a thread, so that a signal is noticed meanwhile.

        Raises:
            Interrupted: asked to leave before the work was done; the thread goes on.
        """
        pool = concurrent.futures.ThreadPoolExecutor(1)
        future = pool.submit(work)
        pool.shutdown(wait=False)
        while not concurrent.futures.wait([future], timeout=0.1).done:
            if self._asked:
                raise Interrupted
        return future.result()

    def _ask(self, number: int, frame) -> None:
        if self._asked:
            os._exit(128 + number)
        self._asked = True
        name = signal.Signals(number).name
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"\n{name}: saving and leaving; once more to leave now\n".encode())
