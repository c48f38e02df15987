# SPDX-License-Identifier: Apache-2.0
"""Job "study": makes the missing cells of a study, then its page."""

import dataclasses
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable

import jax

from mim_jax import config as configs
from mim_jax.evals.base import Eval
from mim_jax.run import files, rundir
from mim_jax.run.interrupt import EXIT_INTERRUPTED, Interrupted
from mim_jax.schema import unknown
from mim_jax.studies import STUDIES, cells, claims, page, results, sizes, work
from mim_jax.studies.cells import Cell, Cells, Finished
from mim_jax.studies.grid import Study, Training, with_given
from mim_jax.studies.work import Bench

_TOPOLOGY = "v5e:4x8"  # of the commands for the compiler's account
_LOOK = 0.2  # seconds between two looks at a process


class FailedCellsError(RuntimeError):
    """Some cells could not be made; names them. Page and other cells are written."""


@dataclasses.dataclass(frozen=True)
class Places:
    """Where a study reads and writes.

    Attributes:
        cells: folder of the cells' files.
        page: folder of the study's page.
        claims: the page of the claims of all studies.
        runs: folder of the run directories.
    """

    cells: pathlib.Path
    page: pathlib.Path
    claims: pathlib.Path
    runs: pathlib.Path

    @classmethod
    def of(
        cls, settings: configs.RunStudy, study: Study, workdir: pathlib.Path
    ) -> "Places":
        """The folders that a config names, or their defaults."""
        above = workdir.parent
        docs = pathlib.Path(settings.recipes).resolve().parent / "docs" / "studies"
        folder = docs if docs.is_dir() else above
        if settings.results:
            folder = pathlib.Path(settings.results)
        claims = (docs.parent if folder.resolve() == docs else folder) / "claims.md"
        name = study.name
        if settings.size != study.small:
            name += f"-{settings.size}"
        if settings.class_list:
            name += f"-{pathlib.Path(settings.class_list).stem}"
        runs = pathlib.Path(settings.runs) if settings.runs else above / "runs"
        return cls(folder / "cells", folder / name, claims, runs)


def run(config: configs.Tree, workdir: files.Place) -> None:
    """Make what is missing of a study, and write its page; or, by `config.commands`,
    print the commands that would.

    Each cell is made by a process of its own: a cell that fails does not stop the
    others, and compiled programs do not pile up.

    Raises:
        ConfigError: the config cannot work.
        Interrupted: SIGTERM or SIGINT came; the run under way is saved.
        FailedCellsError: cells failed. The others are finished and the page is written.
    """
    settings, study, places, found = _opened(config, workdir)
    mine = found.of_study(study)
    bench = Bench(places.runs, places.cells, settings.size)
    several = jax.process_count() > 1
    if settings.only:
        if several:
            _check_results(settings)
        work.make(bench, _named(settings.only, found))
        return
    if several:
        raise configs.ConfigError(
            "a study runs one process per cell: want --config.only=CELL with "
            "--distributed, as --config.commands=slurm and =jobset print it"
        )
    if settings.commands == "jobset":
        _check_results(settings)
    commands = _Commands(settings, workdir, places)
    wanted = [cell for cell in mine if not cell.undefined]
    missing = [cell for cell in wanted if _lacks(bench, cell)]
    if settings.commands:
        print("\n".join(commands.lines(study, found, missing)), flush=True)
        return
    with rundir.claim(workdir, "study"):
        rundir.write_config(workdir, config)
        failed = _make_all(bench, missing, commands, settings)
        _write_page(study, found, mine, bench, places, failed, commands.plain)
        if not settings.keep_runs:
            _remove_runs(bench, found, mine)
    if failed:
        names = {cell.key: cell.name for cell in mine}
        raise FailedCellsError(
            f"{len(failed)} of {len(missing)} missing cells could not be made:\n"
            + "\n".join(f"  {names[key]}: {why}" for key, why in failed.items())
            + f"\nWhat they printed is in {places.runs / 'logs'}; the same command "
            "tries them again"
        )


def on_other_machines(config: configs.Tree, workdir: files.Place) -> configs.Tree:
    """The config of the training run that a study's command makes on machines that are
    not this one; the study's own if it names no cell.

    Raises:
        ConfigError: as `run`; or the numbers would be lost with those machines.
    """
    settings, _, _, found = _opened(config, workdir)
    if not settings.only:
        return config
    _check_results(settings)
    return _named(settings.only, found).tree


def _opened(
    config: configs.Tree, workdir: files.Place
) -> tuple[configs.RunStudy, Study, Places, Cells]:
    """What a config says of a study; folders of data go into the environment."""
    settings = configs.build(config)
    os.environ.update(one.split("=", 1) for one in settings.data)
    if not isinstance(workdir, pathlib.Path):
        raise configs.ConfigError(
            f"workdir={str(workdir)!r}: a study needs a directory of a file system; "
            "want one, or mount the bucket"
        )
    if settings.study not in STUDIES:
        raise configs.ConfigError(
            f"config.study: {unknown('study', settings.study, STUDIES)}"
        )
    try:
        given = dict(one.split("=", 1) for one in settings.given)
        study = with_given(STUDIES[settings.study], given)
    except ValueError as error:
        raise configs.ConfigError(
            f"config.given={settings.given}: {error}; want ROW=RUNDIR"
        ) from error
    if not study.full and settings.size != study.small:
        raise configs.ConfigError(
            f"config.size={settings.size!r}: study {study.name} has size "
            f"{study.small!r} alone"
        )
    places = Places.of(settings, study, workdir)
    found = Cells(_at(settings.size, study), settings, places.runs)
    return settings, study, places, found


def _check_results(settings: configs.RunStudy) -> None:
    """Refuse to leave numbers in a copy of docs/studies on machines that go away."""
    if not settings.results:
        raise configs.ConfigError(
            "results is empty: other machines have a copy of docs/studies, which is "
            "lost with them; want --config.results=DIR on a disk or in a mounted "
            "bucket that this machine sees too, e.g. bucket/studies"
        )


def _at(size: str, study: Study) -> list[Study]:
    """The studies that share the cells of a size: all at the paper's, else those whose
    usual size it is; and the one that runs."""
    full = size == "full"
    others = [
        one for one in STUDIES.values() if size == one.small or (full and one.full)
    ]
    return [study, *(one for one in others if one.name != study.name)]


def _named(name: str, found: Cells) -> Cell:
    """The cell that config.only names."""
    named = {cell.name: cell for cell in found.by_key.values()}
    if name not in named:
        raise configs.ConfigError(f"config.only: {unknown('cell', name, named)}")
    return named[name]


def _lacks(bench: Bench, cell: Cell) -> bool:
    """Whether a cell has something left to make. What its file lacks can only be
    measured while its run directory is there."""
    finished = cells.read(bench.cells, cell, bench.size)
    if finished is None:
        return True
    return bool(finished.lacks(cell)) and work.is_trained(cell.folder, cell)


def _make_all(
    bench: Bench, missing: list[Cell], commands: "_Commands", settings: configs.RunStudy
) -> dict[str, str]:
    """Make cells one after the other; returns why some failed, by key."""
    failed: dict[str, str] = {}
    begun, start = 0, time.monotonic()
    for number, cell in enumerate(missing, 1):
        minutes = (time.monotonic() - start) / 60
        if settings.cells is not None and begun >= settings.cells:
            break
        if settings.minutes is not None and minutes >= settings.minutes:
            break
        if not _lacks(bench, cell):  # another process has made it meanwhile
            continue
        if cell.parent and cell.parent.key in failed:
            failed[cell.key] = f"it begins with {cell.parent.name}, which failed"
            continue
        begun += 1
        print(f"[{number}/{len(missing)}] {cell.name} ...", flush=True)
        began = time.monotonic()
        code = _run(commands.of(cell), bench.log(cell))
        if code == EXIT_INTERRUPTED:
            raise Interrupted
        if code:
            said = _last_words(bench.log(cell)).replace(f"{bench.runs}/", "")
            failed[cell.key] = f"{said} (exit code {code})"
            print(f"    failed: {failed[cell.key]}", flush=True)
        else:
            print(f"    {(time.monotonic() - began) / 60:.1f} minutes", flush=True)
            for line in _warnings(bench.log(cell)):
                print(f"    {line}", flush=True)
    return failed


def _run(command: list[str], log: pathlib.Path) -> int:
    """Run a command, its output going to a file; returns its exit code.

    A signal to leave is passed on, and the command's own exit awaited.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with files.append(log) as out:
        # A session of its own, so that Ctrl-C reaches it once, through us.
        child = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    asked: list[int] = []
    before = {
        name: signal.signal(name, lambda number, frame: asked.append(number))
        for name in (signal.SIGINT, signal.SIGTERM)
    }
    passed = 0
    try:
        while child.poll() is None:
            if len(asked) > passed:
                passed = len(asked)
                child.send_signal(signal.SIGTERM)
            time.sleep(_LOOK)
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
    if asked:
        return EXIT_INTERRUPTED
    return child.returncode


def _warnings(log: pathlib.Path) -> list[str]:
    """What the newest process that wrote a log could not measure, each line once."""
    lines = log.read_text().splitlines()
    return [*dict.fromkeys(line for line in lines if line.startswith(work.UNMEASURED))]


def _last_words(log: pathlib.Path) -> str:
    """The line of a log that says what went wrong."""
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it printed nothing"])[-1].removeprefix("error: ")


class _Commands:
    """The commands that make cells."""

    def __init__(
        self, settings: configs.RunStudy, workdir: files.Place, places: Places
    ):
        own = pathlib.Path(settings.recipes) / f"study_{settings.study}.py"
        if not own.exists():  # a study from outside
            own = pathlib.Path(settings.recipes) / "study.py"
        usual = configs.RunStudy(study=settings.study)
        variant = "" if settings.size == "full" else f":{settings.size}"
        flags = [f"--config={own}{variant}"]
        if settings.plugins:
            flags.insert(0, f"--plugins={','.join(settings.plugins)}")
        if own.stem == "study":
            flags.append(f"--config.study={settings.study}")
        results = settings.results
        if settings.commands == "slurm":  # whose nodes share this disk
            results = results or str(places.cells.parent.absolute())
        for name in (
            *("seeds", "class_list", "given", "data", "recipes", "results", "runs"),
        ):
            value = results if name == "results" else getattr(settings, name)
            if value != getattr(usual, name):
                flags.append(f"--config.{name}={_flag(value)}")
        self._arguments = [*flags, f"--workdir={workdir}"]
        self._settings = settings

    def of(self, cell: Cell) -> list[str]:
        """The command that makes one cell in one process."""
        return [sys.executable, "-m", "mim_jax.main", *self._for(cell)]

    def _for(self, cell: Cell) -> list[str]:
        *first, workdir = self._arguments
        return [*first, f"--config.only={cell.name}", workdir]

    @property
    def plain(self) -> str:
        """The command that makes all that is missing, without folders of this
        machine."""
        folders = tuple(
            f"--config.{name}=" for name in ("recipes", "results", "runs", "data")
        )
        words = [word for word in self._arguments[:-1] if not word.startswith(folders)]
        workdir = f"--workdir=studies/{self._settings.study.replace('_', '-')}"
        return shlex.join(["python", "-m", "mim_jax.main", *words, workdir])

    def lines(self, study: Study, found: Cells, missing: list[Cell]) -> list[str]:
        """What config.commands prints: commands, and remarks that begin with #."""
        if self._settings.commands == "aot":
            return self._accounts(study, found)
        lines = []
        first = [cell for cell in missing if cell.parent is None]
        then = [cell for cell in missing if cell.parent is not None]
        for remark, some in (
            (f"# {study.name}: {len(missing)} cells are missing", first),
            ("# these begin with runs above: start them when those are done", then),
        ):
            if some or remark.startswith(f"# {study.name}"):
                lines.append(remark)
            for cell in some:
                words = {
                    "local": ["python", "-m", "mim_jax.main"],
                    "slurm": ["launch/slurm.sh", "--"],
                    "jobset": ["launch/gke_jobset.sh", "--"],
                }[self._settings.commands]
                line = shlex.join([*words, *self._for(cell)])
                if self._settings.commands != "local":
                    line = f"NAME=mim-{cell.key[:8]} {line}"  # of the job
                lines.append(line)
        return lines

    def _accounts(self, study: Study, found: Cells) -> list[str]:
        """One command of `aot` for each distinct run, without its seed and images."""
        lines: dict[str, None] = {}
        for training in _with_parents(t for t, _ in study.measures()):
            cell = found.of(training, found.seeds[0])
            if cell.undefined:
                continue
            variant = sizes.variant(training, found.size)
            file = pathlib.Path(found.recipes) / f"{training.recipe}.py"
            words = ["python", "-m", "mim_jax.aot"]
            words.append(f"--config={file}{':' if variant else ''}{variant}")
            for leaf in training.leaves_at(found.size):
                value = cell.tree
                for part in leaf.split("."):
                    value = value[part]
                words.append(f"--config.{leaf}={_flag(value)}")
            lines[shlex.join([*words, f"--topology={_TOPOLOGY}"])] = None
        return list(lines)


def _with_parents(trainings: Iterable[Training]) -> list[Training]:
    """Each training after those that it begins with, once."""
    found: dict[int, Training] = {}
    for training in trainings:
        line = [training]
        while line[0].parent is not None:
            line.insert(0, line[0].parent)
        found |= {id(one): one for one in line if id(one) not in found}
    return list(found.values())


def _flag(value: object) -> str:
    """A value as the command line takes it."""
    if isinstance(value, list | tuple):
        return "(" + "".join(f"{one!r}," for one in value) + ")"
    return str(value)


def _write_page(
    study: Study,
    found: Cells,
    mine: list[Cell],
    bench: Bench,
    places: Places,
    failed: dict[str, str],
    command: str,
) -> None:
    finished: dict[str, Finished] = {}
    for cell in mine:
        one = cells.read(bench.cells, cell, bench.size)
        if one is not None:
            finished[cell.key] = one
    evals = configs.KINDS[Eval][1]
    gathered = results.gather(study, found, finished, failed, evals)
    written = page.write(gathered, places.page, evals, command)
    claims.write(STUDIES.values(), places.page.parent, places.claims)
    wanted = len(gathered.own_cells())
    print(f"{len(finished)} of {wanted} cells finished; page in {written}", flush=True)


def _remove_runs(bench: Bench, found: Cells, mine: list[Cell]) -> None:
    """Delete the run directories of finished cells from which no unfinished cell of any
    study begins."""
    for cell in mine:
        family = [cell, *found.children(cell)]
        done = [not _lacks(bench, one) for one in family if not one.undefined]
        folder = bench.runs / cell.name
        if all(done) and folder.exists():
            shutil.rmtree(folder)
            print(f"deleted {folder}", flush=True)
