# SPDX-License-Identifier: Apache-2.0
"""A trace of some steps of a run, for Perfetto and TensorBoard."""

import pathlib
import re
from typing import Any

import jax


def traced_steps(text: str) -> range:
    """The steps that "FIRST:COUNT" names; none for "".

    Raises:
        ValueError: the text is something else.
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
    """Writes the trace of `steps` to `folder`: in a resumed run, of those to come."""

    def __init__(self, folder: pathlib.Path, steps: range):
        self._folder, self._steps, self._on = folder, steps, False

    def before(self, step: int) -> None:
        """Step `step` is about to be dispatched."""
        if step in self._steps and not self._on:
            jax.profiler.start_trace(str(self._folder))
            self._on = True

    def after(self, step: int, values: Any) -> None:
        """It was dispatched; `values` are what it will have computed."""
        if self._on and step + 1 not in self._steps:
            jax.block_until_ready(values)
            self.close()

    def close(self) -> None:
        """Write what there is; calling it again does nothing."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
            print(f"trace of steps in {self._folder}", flush=True)
