# SPDX-License-Identifier: Apache-2.0
"""The log of a run: JSON lines, TensorBoard events, a progress bar or plain lines."""

import contextlib
import dataclasses
import json
import math
import pathlib
import sys
import time
from typing import Any

import tensorboardX
import tqdm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Log:
    """What to log and how often. No setting changes what is learned.

    Attributes:
        every: steps between lines of metrics.jsonl. The values of a line are means over
            the steps since the line before.
        tensorboard: write event files too.
        progress: "bar", "lines" or "none"; "auto" is a bar on a terminal and plain
            lines elsewhere.
    """

    every: int = 50
    tensorboard: bool = True
    progress: str = "auto"

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"every={self.every}: want at least 1 step")
        if self.progress not in ("auto", "bar", "lines", "none"):
            raise ValueError(
                f"progress={self.progress!r} is unknown; known: auto, bar, lines, none"
            )


class Window:
    """Sums of metrics since the last logged step.

    They are saved with each checkpoint, so that a resumed run logs the same means.

    Example:
        >>> window = Window()
        >>> window.add({"loss": 1.0})
        >>> window.add({"loss": 2.0})
        >>> window.take()
        {'loss': 1.5}
    """

    def __init__(self, saved: dict | None = None):
        self.sums: dict[str, float] = dict(saved["sums"]) if saved else {}
        self.steps: int = saved["steps"] if saved else 0

    def add(self, values: dict[str, float]) -> None:
        """Add the values of one step."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps += 1

    def take(self) -> dict[str, float]:
        """The means of all added values; the window is empty afterwards."""
        means = {name: value / self.steps for name, value in self.sums.items()}
        self.sums, self.steps = {}, 0
        return means

    def saved(self) -> dict[str, Any]:
        """The window as plain JSON values, for `Window(saved)`; floats stay exact."""
        return {"sums": dict(self.sums), "steps": self.steps}


class MetricsError(RuntimeError):
    """A line could not be written. A resumed run writes it again."""


class Writer:
    """Writes metrics.jsonl and TensorBoard events of a run that goes on after `step`.

    A killed process may leave lines of later steps and an incomplete last line. Those
    are deleted first: the resumed run writes them again.
    """

    def __init__(self, workdir: pathlib.Path, log: Log, step: int):
        path = workdir / "metrics.jsonl"
        if path.exists():
            replacement = path.with_suffix(".tmp")
            lines = path.read_bytes().splitlines(keepends=True)
            replacement.write_bytes(b"".join(x for x in lines if _step_of(x) <= step))
            replacement.replace(path)
        self._file = path.open("a")
        self._events = None
        if log.tensorboard:
            # The purge also hides what a process wrote that was killed before saving.
            self._events = tensorboardX.SummaryWriter(
                str(workdir / "tensorboard"), purge_step=step + 1
            )

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Write one line, the JSON object {"step": step, **values}.

        Raises:
            MetricsError: the file cannot be written; the disk is full, for example.
        """
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            raise MetricsError(
                f"step {step}: {self._file.name} could not be written: {error}"
            ) from error
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
            self._events.flush()

    def close(self) -> None:
        """Flush and close the files; later writes fail."""
        with contextlib.suppress(OSError):  # `write` has raised it already
            self._file.close()
        if self._events is not None:
            self._events.close()


def _step_of(line: bytes) -> float:
    """The step of a line of metrics.jsonl; infinite if the line is incomplete."""
    try:
        return float(json.loads(line)["step"]) if line[-1:] == b"\n" else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


class Progress:
    """Shows how far a run is: a bar on a terminal, or a plain line per logged step.

    Args:
        mode: as `Log.progress`.
        start, total: steps done at the start of this process, and at its end.
    """

    def __init__(self, mode: str, start: int, total: int):
        if mode == "auto":
            mode = "bar" if sys.stderr.isatty() else "lines"
        self._mode, self._total = mode, total
        self._started, self._first = time.monotonic(), start
        self._bar = None
        if mode == "bar":
            self._bar = tqdm.tqdm(
                total=total, initial=start, unit="step", dynamic_ncols=True
            )

    def advance(self, step: int) -> None:
        """Move the bar: `step` steps are done."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def show(self, step: int, values: dict[str, float]) -> None:
        """Show "loss" and "images_per_second" of a logged step."""
        loss, rate = values["loss"], values["images_per_second"]
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s")
        elif self._mode == "lines":
            pace = (time.monotonic() - self._started) / max(step - self._first, 1)
            left = tqdm.tqdm.format_interval(pace * (self._total - step))
            print(
                f"step {step}/{self._total}  loss {loss:.4f}  {rate:.0f} images/s  "
                f"{left} left",
                flush=True,
            )

    def close(self) -> None:
        """Stop updating; the bar stays on the screen."""
        if self._bar is not None:
            self._bar.close()
