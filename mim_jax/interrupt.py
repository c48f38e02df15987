# SPDX-License-Identifier: Apache-2.0
"""Leaving in good order: SIGTERM and SIGINT ask, the training loop answers."""

import concurrent.futures
import os
import signal
import threading
from collections.abc import Callable
from typing import TypeVar

import jax
from jax.experimental import multihost_utils

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: saved, the same command goes on

_T = TypeVar("_T")


class Interrupted(Exception):
    """The run was asked to leave, and its state is saved."""


class Interrupts:
    """Turns SIGTERM and SIGINT into a flag; a second one ends the process at once.

    With several hosts all must leave at the same step, so there JAX's preemption
    service owns SIGTERM and tells every host which step that is.
    """

    def __enter__(self) -> "Interrupts":
        self._asked = threading.Event()
        several = jax.process_count() > 1
        owned = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
        self._before = {name: signal.signal(name, self._ask) for name in owned}
        return self

    def __exit__(self, *exc) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def asked(self, step: int) -> bool:
        """True if the run should save and leave after `step` steps."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked.is_set()

    def patiently(self, work: Callable[[], _T]) -> _T:
        """The result of long work in C++, such as compiling, which runs in a thread so
        that a signal is noticed meanwhile.

        Raises:
            Interrupted: asked to leave before the work was done.
        """
        pool = concurrent.futures.ThreadPoolExecutor(1)
        future = pool.submit(work)
        while True:
            try:
                return future.result(timeout=0.1)
            except concurrent.futures.TimeoutError:
                if self._asked.is_set():
                    raise Interrupted from None
            finally:
                pool.shutdown(wait=False)

    def _ask(self, number: int, frame) -> None:
        if self._asked.is_set():
            os._exit(128 + number)
        self._asked.set()
        name = signal.Signals(number).name
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"\n{name}: saving and leaving; once more to leave now\n".encode())
