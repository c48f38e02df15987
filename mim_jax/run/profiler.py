# SPDX-License-Identifier: Apache-2.0
"""Profiler traces of some steps of a run, for Perfetto and TensorBoard."""

import pathlib
import re
from typing import Any

import jax

from mim_jax.run import files
from mim_jax.run.hosts import deadline


def traced_steps(text: str) -> range:
    """The steps that "FIRST:COUNT" names, counted from 1; no steps for "".

    Example:
        >>> list(traced_steps("10:3"))
        [10, 11, 12]

    Raises:
        ValueError: the text has another form.
    """
    if not text:
        return range(0)
    found = re.fullmatch(r"(\d+):(\d+)", text)
    first, count = map(int, found.groups()) if found else (0, 0)
    if first < 1 or count < 1:
        raise ValueError(
            f"profile={text!r}: want FIRST:COUNT with both at least 1, e.g. 10:5"
        )
    return range(first, first + count)


class Tracer:
    """Writes a trace of `steps` to `folder`.

    In a resumed run, steps that were done before are not traced again.

    Example:
        >>> tracer = Tracer(pathlib.Path("profile"), traced_steps("2:1"))
        >>> for step in range(1, 4):
        ...     tracer.before(step)
        ...     values = jax.numpy.sin(step / 10)
        ...     tracer.after(step, values)
        trace of steps in profile
        >>> tracer.close()
    """

    def __init__(self, folder: files.Place, steps: range):
        self._folder, self._steps = folder, steps
        self._written: pathlib.Path | None = None  # where a trace is being written

    def before(self, step: int) -> None:
        """Call this just before step `step` is dispatched."""
        if step in self._steps and self._written is None:
            self._written = files.scratch(self._folder)
            jax.profiler.start_trace(str(self._written))

    def after(self, step: int, values: Any) -> None:
        """Call this just after; `values` are arrays that the step computes."""
        if self._written is not None and step + 1 not in self._steps:
            with deadline("all hosts to compute the steps that are traced"):
                jax.block_until_ready(values)
            self.close()

    def close(self) -> None:
        """Write the trace if one is running; otherwise do nothing."""
        if self._written is not None:
            written, self._written = self._written, None
            jax.profiler.stop_trace()
            files.deliver(written, self._folder)
            print(f"trace of steps in {self._folder}", flush=True)
