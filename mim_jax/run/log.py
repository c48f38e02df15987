# SPDX-License-Identifier: Apache-2.0
"""The log of a run: JSON lines, TensorBoard events, a progress bar or plain lines."""

import contextlib
import dataclasses
import json
import math
import sys
import time
from typing import Any

import tqdm

from mim_jax.run import files
from mim_jax.run.wandb_run import Wandb
from mim_jax.schema import check_ranges, to_json, within

_SHOWN = 8  # damaged lines that a warning numbers, at most
_LARGEST = 1e300  # number that a row can have


@dataclasses.dataclass(frozen=True, kw_only=True)
class Log:
    """What to log and how often. No setting changes what is learned.

    Attributes:
        every: steps between lines of metrics.jsonl. The values of a line are means over
            the steps since the line before, each step with the same weight. So is a
            norm: the mean of the steps' norms, not the norm of their mean, and a ratio
            is the mean of the steps' ratios.
        tensorboard: write event files too.
        wandb: project of Weights & Biases to log to, too; "" is off. It needs the extra
            `wandb`. WANDB_MODE=offline in the environment keeps the log on this
            machine, for `wandb sync`.
        progress: "bar", "lines" or "none"; "auto" is a bar on a terminal and plain
            lines elsewhere.
    """

    every: int = within(50, least=1)
    tensorboard: bool = True
    wandb: str = ""
    progress: str = "auto"

    def __post_init__(self):
        check_ranges(self)
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
        sums = saved["sums"] if saved else {}
        self.sums: dict[str, float] = {
            name: math.nan if value is None else value for name, value in sums.items()
        }
        self.steps: int = saved["steps"] if saved else 0

    def add(self, values: dict[str, float]) -> None:
        """Add the values of one step.

        A name that the first step of the window lacked is left out until the next
        window: an older program saved the window without it.
        """
        for name, value in values.items():
            if name in self.sums or not self.steps:
                self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps += 1

    def take(self) -> dict[str, float]:
        """The means of all added values; the window is empty afterwards."""
        means = {name: value / self.steps for name, value in self.sums.items()}
        self.sums, self.steps = {}, 0
        return means

    def saved(self) -> dict[str, Any]:
        """The window as plain JSON values, for `Window(saved)`; floats stay exact, and
        None stands for a sum that is not finite."""
        sums = {name: None if _odd(one) else one for name, one in self.sums.items()}
        return {"sums": sums, "steps": self.steps}


class MetricsError(files.DiskError):
    """A line could not be written. A resumed run writes it again."""


def read_rows(path: files.Place) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, in the order of the file. No file has no rows.

    A row of training has "loss", and one of evaluations has not. Its step is an int,
    and its other values are numbers or None. Lines that are no such row are left out,
    and a warning numbers them; an incomplete last one needs none, since the file may
    be of a run under way, or of a killed one.
    """
    return [row for row, _ in _rows_and_damage(path)[0]]


def _rows_and_damage(
    path: files.Place,
) -> tuple[list[tuple[dict[str, Any], bytes]], list[bytes]]:
    """The rows of a metrics.jsonl with their lines, and the lines that are damaged."""
    lines = files.read(path).splitlines(keepends=True) if files.exists(path) else []
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    found = [(_row(line), line) for line in lines]
    damaged = [number for number, (row, _) in enumerate(found, 1) if row is None]
    if damaged:
        shown = ", ".join(map(str, damaged[:_SHOWN]))
        more = " and others" if len(damaged) > _SHOWN else ""
        _warn(f"{path}: damaged and left out: line {shown}{more}")
    rows = [(row, line) for row, line in found if row is not None]
    return rows, [lines[number - 1] for number in damaged]


def _row(line: bytes) -> dict[str, Any] | None:
    """The row of a line; None if it is damaged."""
    try:
        row = json.loads(line)
        for value in row.values():
            # `abs` raises for what is no number. Huge ones cannot be drawn.
            if value is not None and _LARGEST < abs(value) < math.inf:
                return None
        return row if type(row["step"]) is int else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    except RecursionError:  # brackets within brackets
        return None


class Writer:
    """Writes metrics.jsonl, TensorBoard events and, if `log.wandb` names a project, to
    Weights & Biases, for a run that goes on after `step`.

    A killed process may leave lines of later steps and an incomplete last line. Those
    are deleted first: the resumed run writes them again. Other damaged lines are moved
    to metrics-damaged.jsonl, with a warning.

    Args:
        workdir: run directory.
        log: what to write.
        step: the last step that is done.
        logged: the last step that has a row of training: a warning tells if the file
            lacks it.
    Raises:
        DiskError: a file cannot be read or written.
    """

    def __init__(self, workdir: files.Place, log: Log, step: int, logged: int = 0):
        self._path, self._events = workdir / "metrics.jsonl", None
        rows, damaged = _rows_and_damage(self._path)
        rows = [(row, line) for row, line in rows if row["step"] <= step]
        last = max((row["step"] for row, _ in rows if "loss" in row), default=0)
        if last < logged:
            _warn(
                f"{self._path} has no row after step {last}, and step {logged} was "
                "logged: rows are lost, and nothing else is"
            )
        try:
            if damaged:
                with files.append(workdir / "metrics-damaged.jsonl") as file:
                    file.writelines(damaged)
            if files.exists(self._path):
                files.write(self._path, b"".join(line for _, line in rows))
            self._file = files.append(self._path)
            if log.tensorboard:
                from mim_jax.run.events import Events  # slow to import

                self._events = Events(workdir / "tensorboard", step)
        except OSError as error:
            raise MetricsError(f"the log could not be written: {error}") from error
        self._wandb = Wandb(workdir, log.wandb) if log.wandb else None

    def write(
        self,
        step: int,
        values: dict[str, Any],
        pictures: dict[str, files.Place] | None = None,
    ) -> None:
        """Write one line, the JSON object {"step": step, **values}.

        JSON has no NaN and no infinity: such a value is null in the line, and nowhere
        else.

        Args:
            pictures: PNG files by name, for TensorBoard and Weights & Biases.
        Raises:
            MetricsError: the file cannot be written; the disk is full, for example.
        """
        pictures = pictures or {}
        finite = {name: None if _odd(v) else v for name, v in values.items()}
        where = self._path
        try:
            self._file.write(to_json({"step": step, **finite}).encode() + b"\n")
            self._file.flush()
            if self._events is not None:
                where = self._events.path
                for name, value in finite.items():
                    if value is not None:
                        self._events.scalar(name, value, step)
                for name, path in pictures.items():
                    self._events.picture(name, path, step)
                self._events.flush()
        except OSError as error:
            raise MetricsError(
                f"step {step}: {where} could not be written: {error}"
            ) from error
        if self._wandb is not None:
            self._wandb.log(step, finite, pictures)

    def sync(self) -> None:
        """Bring metrics.jsonl to the disk or the bucket now.

        Raises:
            MetricsError: it cannot be written.
        """
        try:
            files.sync(self._file)
        except OSError as error:
            raise MetricsError(f"{self._path} could not be written: {error}") from error

    def close(self) -> None:
        """Flush and close the files; later writes fail."""
        for file in (self._file, self._events):
            # `write` or `sync` has raised it already.
            with contextlib.suppress(OSError, files.DiskError):
                if file is not None:
                    file.close()
        if self._wandb is not None:
            self._wandb.close()


def _odd(value: Any) -> bool:
    """Whether it is a number that JSON does not have."""
    return isinstance(value, float) and not math.isfinite(value)


def _warn(text: str) -> None:
    print(f"WARNING: {text}", file=sys.stderr, flush=True)


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
        # The first step waits for the compiler and the readers: the pace leaves it out.
        self._first, self._since = start, None
        self._started, self._bar = time.monotonic(), None
        if mode == "bar":
            self._bar = tqdm.tqdm(
                total=total, initial=start, unit="step", dynamic_ncols=True
            )

    def advance(self, step: int) -> None:
        """Move the bar: `step` steps are done."""
        if self._since is None:
            self._since = time.monotonic(), step
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def show(self, step: int, values: dict[str, float]) -> None:
        """Show "loss" and "images_per_second" of a logged step."""
        loss, rate = values["loss"], values["images_per_second"]
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s")
        elif self._mode == "lines":
            since, first = self._since or (self._started, self._first)
            if step <= first:  # it is the first step itself
                since, first = self._started, self._first
            pace = (time.monotonic() - since) / max(step - first, 1)
            left = tqdm.tqdm.format_interval(pace * (self._total - step))
            print(
                f"step {step}/{self._total}  loss {loss:.4f}  {rate:.0f} images/s  "
                f"{left} left",
                flush=True,
            )

    def say(self, line: str) -> None:
        """Show a line of text, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(line)
        elif self._mode == "lines":
            print(line, flush=True)

    def close(self) -> None:
        """Stop updating; the bar stays on the screen."""
        if self._bar is not None:
            self._bar.close()
