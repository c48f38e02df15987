# SPDX-License-Identifier: Apache-2.0
"""Profiler traces of some steps of a run, for Perfetto and TensorBoard."""

import pathlib
import re
from typing import Any

import jax


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

    def __init__(self, folder: pathlib.Path, steps: range):
        self._folder, self._steps, self._on = folder, steps, False

    def before(self, step: int) -> None:
        """Call this just before step `step` is dispatched."""
        if step in self._steps and not self._on:
            jax.profiler.start_trace(str(self._folder))
            self._on = True

    def after(self, step: int, values: Any) -> None:
        """Call this just after; `values` are arrays that the step computes."""
        if self._on and step + 1 not in self._steps:
            jax.block_until_ready(values)
            self.close()

    def close(self) -> None:
        """Write the trace if one is running; otherwise do nothing."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
            print(f"trace of steps in {self._folder}", flush=True)
