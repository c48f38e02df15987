# SPDX-License-Identifier: Apache-2.0
"""Evaluations of the state in memory while a run trains."""

import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
from matplotlib.figure import Figure

from mim_jax.evals.base import Eval, Run, caption, drawn, measured
from mim_jax.evals.report import Number, Report, write
from mim_jax.run import files
from mim_jax.run.hosts import REPORT, from_hosts
from mim_jax.run.interrupt import Interrupted, Interrupts
from mim_jax.run.log import read_rows
from mim_jax.run.monitor import Monitor
from mim_jax.run.report import InMemory
from mim_jax.run.storage import wait_for_all
from mim_jax.state import TrainState

_COST = "evaluation_seconds"  # every row of evaluations has it


class _Found(NamedTuple):
    """What one evaluation came to.

    Attributes:
        evaluation: what measured.
        reports, figures: what was found, as `write` takes it; nothing if the evaluation
            refused.
        reason: why it refused, or "".
        seconds: what it took.
    """

    evaluation: Eval
    reports: dict[str, Report]
    figures: dict[str, Figure]
    reason: str
    seconds: float


class During:
    """Measures the state every `config.evaluate_every` steps, and when the run is done.

    The numbers go to a row of metrics.jsonl of their own, the files to report/step-N/,
    and both to the other logs. Nothing of the state changes, so the run learns the same
    with and without. Of several hosts the first one measures, and the others wait.

    Args:
        memory: shows the state to evaluations.
        monitor: writes the log.
        interrupts: SIGTERM and SIGINT.

    Attributes:
        interrupts: as given.
        closing: what evaluations of the closing report found about the last state, by
            name, as far as they ran.
    """

    def __init__(self, memory: InMemory, monitor: Monitor, interrupts: Interrupts):
        self.interrupts = interrupts
        self.closing: dict[str, Report] = {}
        self._memory, self._monitor, self._plan = memory, monitor, memory.plan

    def catch_up(self, step: int, state: TrainState) -> None:
        """Measure the state that a run goes on from, if that is still to be done.

        Raises:
            Interrupted: SIGTERM or SIGINT came meanwhile.
        """
        if not self._plan.settings.evaluate_every:
            return
        rows = read_rows(self._memory.workdir / "metrics.jsonl")
        done = any(row["step"] == step and _COST in row for row in rows)
        # The first host decides: it writes the file.
        (done, *_) = from_hosts(done, "whether it was measured")
        if not done and self.asked_at(step, state):
            raise Interrupted

    def asked_at(self, step: int, state: TrainState) -> bool:
        """Measure the state after step `step`, if it is time.

        Returns:
            True if SIGTERM or SIGINT came meanwhile: then nothing was written, and the
            run should save and leave. A run that goes on from there measures again.
        """
        every = self._plan.settings.evaluate_every
        if not every or not step or (step % every and step != self._plan.total):
            return False
        if self._monitor.settle() != step:
            return False  # the batch was skipped, so the step is still to be made
        begun = time.monotonic()
        try:
            # In another thread, where the transfer guard of the loop does not hold.
            found = self.interrupts.patiently(lambda: self._measured(step, state))
        except Interrupted:
            return True
        self._write(step, found, begun)
        return False

    def _chosen(self, step: int) -> dict[str, Eval]:
        """What to run, by name. At the last step, what the closing report needs."""
        settings = self._plan.settings
        found = settings.evaluations
        if step == self._plan.stop:
            closing = settings.closing
            found |= {name: closing[name] for name in found.keys() & closing.keys()}
        return found

    def _measured(self, step: int, state: TrainState) -> dict[str, _Found]:
        """What the evaluations come to, by name; {} on all hosts but the first."""
        run, found = self._memory.run(state), {}
        if run is not None:
            chosen = self._chosen(step).items()
            found = {name: self._one(run, one) for name, one in chosen}
        if jax.process_count() > 1:
            wait_for_all(f"evaluated step {step}", REPORT)
        return found

    def _one(self, run: Run, evaluation: Eval) -> _Found:
        """What one evaluation comes to."""
        begun, reports, figures, reason = time.monotonic(), {}, {}, ""
        try:
            report = measured(evaluation, run, self._memory.passes)
            reports = {caption(run): report}
            figures = drawn(evaluation, reports)
        except ValueError as error:
            reason = str(error)
        seconds = time.monotonic() - begun
        return _Found(evaluation, reports, figures, reason, seconds)

    def _write(self, step: int, found: dict[str, _Found], begun: float) -> None:
        """Write what was found, and say so; `begun` is when the measuring began."""
        folder = self._memory.workdir / "report" / f"step-{step}"
        files.make(folder.parent)
        where = f"step {step}/{self._plan.stop}  "
        values: dict[str, float] = {}
        pictures = {}
        for name, one in found.items():
            values[f"{name}/seconds"] = one.seconds
            if one.reason:
                self._monitor.say(f"{where}{name} could not measure: {one.reason}")
                continue
            drawings = write(folder, name, one.reports, one.figures)
            pictures |= {f"{name}/{title}": path for title, path in drawings.items()}
            (report,) = one.reports.values()
            if step == self._plan.stop and name in self._plan.settings.closing:
                self.closing[name] = report
            values |= {f"{name}/{key}": v for key, v in report.scalars.items()}
            said = one.evaluation.sentence(report)
            said = said or "; ".join(_headlines(one.evaluation, report))
            self._monitor.say(f"{where}{name}, {one.seconds:.1f} s: {said}")
        seconds = time.monotonic() - begun
        self._monitor.say(f"{where}evaluated in {seconds:.1f} s: {folder}")
        self._monitor.evaluated(step, values | {_COST: seconds}, pictures, seconds)


def _headlines(evaluation: Eval, report: Report) -> Iterator[str]:
    """The headline numbers of a report in words."""
    for headline in evaluation.headlines:
        for key, title in headline.columns(report.numbers).items():
            yield f"{title} {_shown(report.numbers[key])}"


def _shown(number: Number) -> str:
    if number.unit == "share":
        return f"{number.value:.1%}"
    return f"{number.value:.4g} {number.unit}".removesuffix(" 1")
