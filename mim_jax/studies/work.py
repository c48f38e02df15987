# SPDX-License-Identifier: Apache-2.0
"""Makes one cell: trains its run, measures it, and writes its file."""

import contextlib
import dataclasses
import datetime
import pathlib
import platform
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np

import mim_jax
from mim_jax import config as configs
from mim_jax import train
from mim_jax.evals.base import Eval
from mim_jax.run import files, loading, programs, rundir, warmstart
from mim_jax.run.hosts import REPORT
from mim_jax.run.loading import Loaded
from mim_jax.run.storage import wait_for_all
from mim_jax.studies import cells, sizes
from mim_jax.studies.cells import Cell, Measured
from mim_jax.studies.grid import Measure

_WAIT = 5.0  # seconds between two looks at a lock
# The file of a run directory that says that the run is whole; it holds the cell's key.
_MARK = "trained"
# Begins a line on stderr about a measure whose data are not there.
UNMEASURED = "WARNING: not measured: "


@dataclasses.dataclass(frozen=True)
class Bench:
    """Where cells are made.

    Attributes:
        runs: folder of the run directories.
        cells: folder of the cells' files.
        size: of the study.
    """

    runs: pathlib.Path
    cells: pathlib.Path
    size: str

    def lock(self, cell: Cell) -> pathlib.Path:
        """The folder that a process locks while it makes a cell."""
        return self.runs / "locks" / cell.name

    def log(self, cell: Cell) -> pathlib.Path:
        """What the process that makes a cell prints."""
        return self.runs / "logs" / f"{cell.name}.txt"


def make(bench: Bench, cell: Cell) -> None:
    """Train and measure a cell, unless it is finished. The run that it begins with is
    made first, if its run directory is not there.

    All hosts call this. It waits while another process makes the same cell.

    Raises:
        ConfigError: the cell cannot be; and whatever `train.run` raises.
    """
    if cell.undefined:
        raise configs.ConfigError(f"cell {cell.name} is not defined: {cell.undefined}")
    programs.keep()
    for one in cell.line:
        with _claimed(bench.lock(one)):
            if one is cell:
                _finish(bench, one)
            elif not is_trained(one.folder, one):
                _finish(bench, one, again=True)
        if jax.process_count() > 1:  # the first host may measure for hours
            wait_for_all(f"{one.name} is made", REPORT)


@contextlib.contextmanager
def _claimed(folder: pathlib.Path) -> Iterator[None]:
    """The lock of a cell, once no other process has it."""
    told = False
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(rundir.claim(folder))
                break
            except rundir.InUseError as error:
                if not told:
                    print(f"waiting: {error}", flush=True)
                told = True
                time.sleep(_WAIT)
        yield


def _finish(bench: Bench, cell: Cell, again: bool = False) -> None:
    """Train and measure what is missing of one cell. A run that no study measures, only
    begins with, gets its file too.

    Args:
        again: train, even if the cell's file is there: another run begins with it.
    """
    before = cells.read(bench.cells, cell, bench.size)
    lacks = list(cell.measures) if before is None else before.lacks(cell)
    whole = before is not None and not lacks
    if whole and not again:
        return
    folder = cell.folder
    start, processor = time.monotonic(), time.process_time()
    resumed = folder.exists()
    if not is_trained(folder, cell):
        if jax.process_index() == 0:
            _warn(bench, cell, lacks)
        train.run(cell.tree, folder)
        if jax.process_index() == 0:
            files.write(folder / _MARK, cell.key)
    trained = time.monotonic()
    if jax.process_index() != 0 or whole:
        return
    measured = {} if before is None else dict(before.measured)
    run, training = loading.load(folder)
    loaded = Loaded(folder, run, training)
    known = configs.KINDS[Eval][1]
    for name in lacks:
        if cell.measures[name].eval in known:
            print(f"measuring {name}", flush=True)
            found = _measured(cell.measures[name], loaded, bench.size)
            if found is not None:
                measured[name] = found
    about = {} if before is None else before.file
    if before is None:
        about = {
            "steps": run.step,
            "minutes": _minutes(time.monotonic() - start),
            "minutes_training": _minutes(trained - start),
            "minutes_of_processors": _minutes(time.process_time() - processor),
            "resumed": resumed,
            "processor": processor_name(),
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "versions": {
                "mim_jax": mim_jax.__version__,
                "jax": jax.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
            "finished": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        }
    path = cells.write(bench.cells, cell, bench.size, about, measured)
    print(f"wrote {path}", flush=True)


def is_trained(folder: pathlib.Path, cell: Cell) -> bool:
    """Whether a run directory holds the whole run of a cell, and no other run."""
    if cell.given:
        return True
    mark = folder / _MARK
    if not mark.exists() or mark.read_bytes() != cell.key.encode():
        return False
    try:
        saved = rundir.saved_config(folder)
        if saved is None:
            return False
        # The run that it began with decided some settings, which only its own config
        # has. Somebody may have trained on there, with other settings.
        declared = warmstart.adopt(cell.tree, folder)
        return not cells.differences(saved, declared, cell.name)
    except configs.ConfigError:
        return False


def _evaluation(measure: Measure, size: str) -> Eval:
    settings = {
        name: sizes.setting(value, size)
        for name, value in measure.settings_at(size).items()
    }
    return configs.KINDS[Eval][1][measure.eval](**settings)


def _measured(measure: Measure, loaded: Loaded, size: str) -> Measured | None:
    """What a measure finds on a run, or why it cannot measure such a run; None if its
    data are not there, so that a later start measures it."""
    evaluation = _evaluation(measure, size)
    one = loaded if measure.weights == "trained" else loaded.untrained("random")
    if reason := loading.absent(evaluation, loaded.training):
        print(f"{UNMEASURED}{measure.name}: {reason}", file=sys.stderr, flush=True)
        return None
    reports, reasons = loading.measure(evaluation, {"run": one})
    if reasons:
        return Measured({}, {}, missing=reasons["run"])
    report = reports["run"]
    kept = {name: report.arrays[name] for name in measure.keep}
    return Measured(report.numbers, kept)


def _warn(bench: Bench, cell: Cell, lacks: list[str]) -> None:
    """Say before a run is trained what could not be measured on it."""
    known = configs.KINDS[Eval][1]
    try:
        settings = configs.build(warmstart.adopt(cell.tree, cell.folder))
    except configs.ConfigError:
        return  # training says it
    for measure in (cell.measures[name] for name in lacks):
        if measure.eval in known:
            evaluation = _evaluation(measure, bench.size)
            if reason := loading.absent(evaluation, settings):
                print(
                    f"WARNING: {measure.name} cannot be measured as it is: {reason}. "
                    "Once its data are there, the same command measures it, if the run "
                    "directory is still there",
                    file=sys.stderr,
                    flush=True,
                )


def _minutes(seconds: float) -> float:
    return round(seconds / 60, 2)


def processor_name() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return named[0] if named else platform.processor() or platform.machine()
