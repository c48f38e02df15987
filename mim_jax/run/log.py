# SPDX-License-Identifier: Apache-2.0
"""What a run tells: JSON lines, TensorBoard events, a progress bar or plain lines."""

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
    """What is written how often; never changes what is learned.

    Attributes:
        every: steps between lines of metrics.jsonl; a line's values are means over the
            steps since the last one.
        tensorboard: write event files too.
        progress: "auto" shows a bar on a terminal and plain lines elsewhere; "bar",
            "lines" or "none" decide.
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
    """Sums since the last logged step; saved with a checkpoint, so that a resumed run
    logs the same means."""

    def __init__(self, saved: dict | None = None):
        self.sums: dict[str, float] = dict(saved["sums"]) if saved else {}
        self.steps: int = saved["steps"] if saved else 0

    def add(self, values: dict[str, float]) -> None:
        """One step's values."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps += 1

    def take(self) -> dict[str, float]:
        """The means, and a new window."""
        means = {name: value / self.steps for name, value in self.sums.items()}
        self.sums, self.steps = {}, 0
        return means

    def saved(self) -> dict[str, Any]:
        """Plain JSON values; floats survive exactly."""
        return {"sums": dict(self.sums), "steps": self.steps}


class MetricsError(RuntimeError):
    """A line could not be written; a resumed run writes it again."""


class Writer:
    """metrics.jsonl and TensorBoard events of one run, continued after `step`.

    Lines of later steps and torn lines, left by a killed process, are dropped: the
    resumed run writes them again.
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
            # The purge also hides what a run wrote that was killed before it saved.
            self._events = tensorboardX.SummaryWriter(
                str(workdir / "tensorboard"), purge_step=step + 1
            )

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One object: {"step": step, **values}.

        Raises:
            MetricsError: the disk does not take it.
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
        """Flush and close; later writes fail."""
        with contextlib.suppress(OSError):  # told by `write` already
            self._file.close()
        if self._events is not None:
            self._events.close()


def _step_of(line: bytes) -> float:
    """The step that a line of metrics.jsonl tells of; infinite if it is torn."""
    try:
        return float(json.loads(line)["step"]) if line[-1:] == b"\n" else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


class Progress:
    """A bar on a terminal, plain lines elsewhere, nothing on hosts but the first."""

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
        """`step` steps are done."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def show(self, step: int, values: dict[str, float]) -> None:
        """Values of a logged step."""
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
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
