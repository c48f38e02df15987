# SPDX-License-Identifier: Apache-2.0
"""Signals: after SIGTERM or SIGINT the training loop saves the state and leaves."""

import concurrent.futures
import os
import signal
from collections.abc import Callable
from typing import TypeVar

import jax
from jax.experimental import multihost_utils

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: saved; the same command resumes the run

_T = TypeVar("_T")


class Interrupted(Exception):
    """The run was asked to leave. Its state is saved, or there was none to save."""


class Interrupts:
    """Inside this block SIGTERM and SIGINT set a flag instead of ending the process.

    A second signal ends the process at once, with exit code 128 + its number.

    With several hosts, all must leave at the same step. There JAX's preemption service
    handles SIGTERM and tells every host that step; SIGINT ends the process, and the
    other hosts fail with it.

    Example:
        >>> with Interrupts() as interrupts:
        ...     for step in range(1, 4):
        ...         if interrupts.asked(step):
        ...             break  # after saving
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
        """True if the run should save and leave, now that `step` steps are done.

        With several hosts, every host must call this after every step.
        """
        if jax.process_count() > 1:
            # Count from the start of this process: JAX agrees on the step after the
            # last one that any host reported, and before the first report that is 1,
            # also in a resumed run.
            self._steps += 1
            return multihost_utils.reached_preemption_sync_point(self._steps)
        return self._asked

    def patiently(self, work: Callable[[], _T]) -> _T:
        """The result of `work()`, run in a thread so that a signal can end the wait.

        Args:
            work: takes long and changes nothing outside, such as compiling.
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
        # Not print: the signal may have interrupted a print.
        os.write(2, f"\n{name}: saving and leaving; once more to leave now\n".encode())
