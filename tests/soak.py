# SPDX-License-Identifier: Apache-2.0
"""Kills runs at random moments, starts them again, and compares what they end with, bit
for bit, with runs that nobody disturbed.

    PYTHONPATH=.:tests python tests/soak.py --kills=200 --folder=/tmp/soak

Every kill is aimed at a phase: start-up, compilation, a step, a save, an evaluation
while training, the closing report. One in four is SIGTERM, which must end in exit code
75 (or 0, if the run was done); the others are SIGKILL. The same command goes on where
it was stopped itself. The last line says "N of N kills ended bit-exact"; the exit code
is 1 if one did not.

`--place` is where the run directories lie: a folder, or gs://BUCKET/FOLDER. `--serve`
serves buckets from this machine, and takes one of these.
"""

import argparse
import atexit
import collections
import contextlib
import ctypes
import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

from etils import epath

ROOT = pathlib.Path(__file__).parents[1]
STEPS, EVERY = 24, 4
# Seconds for one start of a run, of which an idle machine takes a minute at most.
PATIENCE = 1200
KILLS = 5  # of one run, at most
_TASKS = pathlib.Path("/proc/self/task")
_WITH_PARENT = 1  # PR_SET_PDEATHSIG: who ends this command ends its runs

LEAVES = {
    "steps": STEPS,
    "batch_size": 16,
    "data.workers": 0,
    "data.threads": 1,
    "checkpoint.every": EVERY,
    "log.every": 1,
    "log.progress": "lines",
    "evaluate_every": 8,
    "evaluate_with": '("knn",)',
}
SMALL = {
    "report.k": "(3,)",
    "report.rows": 1,
    "report.neighbours": 1,
    "objective.encoder.depth": 1,
    "objective.encoder.width": 16,
    "objective.encoder.heads": 2,
}
DECODER = {"objective.decoder.width": 16, "objective.decoder.heads": 2}


class Kind(NamedTuple):
    """A kind of run: its config, the leaves besides LEAVES, and its processes."""

    config: str
    leaves: dict[str, Any]
    processes: int = 1
    begins: str = ""  # with the run of another kind


KINDS = {
    "mae": Kind("mae.py:digits,eval=knn", SMALL | DECODER),
    "cmae": Kind("cmae.py:digits,eval=knn", SMALL),
    "dino": Kind("dino.py:digits,eval=knn", SMALL),
    "finetune": Kind("finetune.py:digits", {}, begins="mae"),
    "mae of two": Kind("mae.py:digits,eval=knn", SMALL | DECODER, 2),
    "cmae of two": Kind("cmae.py:digits,eval=knn", SMALL, 2),
}


class Kill(NamedTuple):
    """When a run is killed: so long after a phase began, `at` its so manieth time."""

    phase: str
    at: int
    delay: float
    signal: int


@dataclasses.dataclass
class Result:
    """What became of one run.

    Attributes:
        kills: of each, the phase that it was aimed at.
        wrong: what is not as it should be; "" if all is.
    """

    kind: str
    seed: str
    kills: list[str]
    wrong: str


def drawn(rng: random.Random) -> Kill:
    """A kill at a random moment."""
    longest = dict(start=1.0, compile=2.0, step=0.05, save=0.05, evaluate=0.5, report=1)
    # After a kill in the report there are no steps left for other kills of this run.
    (phase,) = rng.choices(list(longest), weights=[2, 2, 4, 4, 4, 1])
    number = signal.SIGTERM if rng.random() < 0.25 else signal.SIGKILL
    return Kill(phase, rng.randrange(1, 24), rng.uniform(0, longest[phase]), number)


class Start:
    """One start of a run: its processes, forked from this one, which has imported
    everything and used no device yet."""

    def __init__(self, kind: Kind, workdir: str, init_from: str, said: pathlib.Path):
        self._said, self._workdir = said, workdir
        leaves = LEAVES | kind.leaves
        if init_from:
            leaves |= {"init_from.run": init_from}
        words = [f"--config=configs/{kind.config}", f"--workdir={workdir}"]
        words += [f"--config.{name}={value}" for name, value in leaves.items()]
        if kind.processes > 1:
            words.append("--distributed")
        port = free_port()
        said.write_text("")
        self._pids = {}
        for number in range(kind.processes):
            variables = {}
            if kind.processes > 1:
                variables = {
                    "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                    "JAX_NUM_PROCESSES": str(kind.processes),
                    "JAX_PROCESS_ID": str(number),
                }
            pid = in_child(lambda v=variables: self._main(words, v))
            self._pids[pid] = None  # its exit code, once it has ended

    def _main(self, words: list[str], variables: dict[str, str]) -> int:
        out = os.open(self._said, os.O_WRONLY | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.environ.update(variables)
        os.chdir(ROOT)
        from mim_jax import main

        sys.argv = ["main", *words]
        main.start()
        return 0

    @property
    def told(self) -> str:
        return self._said.read_text(errors="replace")

    def ended(self) -> bool:
        """Whether all processes have; one that failed takes the others along."""
        for pid, code in self._pids.items():
            if code is None:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self._pids[pid] = os.waitstatus_to_exitcode(status)
        codes = set(self._pids.values())
        if codes - {None, 0, 75} and None in codes:
            self.send(signal.SIGKILL)
        return None not in codes

    def send(self, number: int) -> None:
        for pid, code in self._pids.items():
            if code is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, number)

    def wait(self) -> list[int]:
        """The exit codes."""
        until(self.ended, PATIENCE)
        return list(self._pids.values())

    def kill(self, kill: Kill) -> bool:
        """Kills the run at that moment; False if it ended before."""
        self._reach(kill)
        end = time.monotonic() + kill.delay
        while time.monotonic() < end and not self.ended():
            time.sleep(0.001)
        if self.ended():
            return False
        self.send(kill.signal)
        self.wait()
        return True

    def _reach(self, kill: Kill) -> None:
        """Waits until the phase begins, or the run ends."""
        checkpoints = pathlib.Path(self._workdir) / "checkpoints"

        def begun() -> bool:
            told = self.told
            if kill.phase == "start":
                return True
            if kill.phase == "compile":
                return "length  " in told
            steps = [int(line.split("/")[0].split()[1]) for line in _rows(told)]
            done = max(steps, default=0)
            if kill.phase == "step":
                return done >= kill.at
            if kill.phase == "report":
                return done >= STEPS
            if kill.phase == "evaluate":
                return any(step % 8 == 0 for step in steps)
            # A save: what it writes has another name until it is committed. A bucket
            # is not asked: there it begins after every so many steps.
            if done < kill.at - EVERY:
                return False
            if "://" in self._workdir:
                return any(step % EVERY == 0 for step in steps)
            if not checkpoints.exists():
                return False
            names = [path.name for path in checkpoints.iterdir()]
            return any("tmp" in name for name in names)

        until(lambda: self.ended() or begun(), PATIENCE)


def _rows(told: str) -> list[str]:
    return [line for line in told.splitlines() if line.startswith("step ")]


def until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"nothing happened in {seconds} s")
        time.sleep(0.002)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def in_child(work: Callable[[], int]) -> int:
    """The pid of a child, in a group of its own, whose exit code is what `work`
    returns."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        ctypes.CDLL(None).prctl(_WITH_PARENT, signal.SIGKILL)
        code = work()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else bool(error.code)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(code))


def asked(work: Callable[[], Any]) -> bool:
    """Whether what `work` returns is true, in a child: clients of buckets start
    threads, which later forks of this process would lose."""
    _, status = os.waitpid(in_child(lambda: not work()), 0)
    return status == 0


def exists(place: str) -> bool:
    from mim_jax.run import files

    return asked(lambda: files.exists(files.place(place)))


def remove(place: str) -> None:
    from mim_jax.run import files

    asked(lambda: files.remove(files.place(place)))


def serve() -> dict[str, str]:
    """Serves the bucket gs://soak in a child; the variables by which it is found."""
    reader, writer = os.pipe()

    def work() -> int:
        import logging

        import bucket_server

        logging.disable()  # each question for what is not there would be an error
        with bucket_server.Server() as server:
            server.make("soak")
            os.write(writer, server.url.encode())
            signal.pause()
        return 0

    in_child(work)
    url = os.read(reader, 1000).decode()
    found = dict.fromkeys(("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"), url)
    found["CLOUD_STORAGE_EMULATOR_ENDPOINT"] = url
    return found | {"GOOGLE_AUTH_TOKEN_FOR_TESTING": "none", "FSSPEC_GCS_TOKEN": "anon"}


def run_whole(kind: Kind, workdir: str, init_from: str, said: pathlib.Path) -> None:
    """A run that nobody disturbs."""
    start = Start(kind, workdir, init_from, said)
    codes = start.wait()
    if any(codes):
        raise RuntimeError(f"{workdir}: exit codes {codes}:\n{start.told}")


def disturbed(
    name: str, seed: str, place: str, folder: pathlib.Path, most: int
) -> Result:
    """A run that is killed up to `most` times; compared with its twin in the end."""
    kind, rng = KINDS[name], random.Random(seed)
    workdir, said = f"{place}/run-{seed}".replace(" ", "-"), folder / "said.txt"
    if exists(workdir):  # this command was stopped meanwhile
        remove(workdir)
    init_from = twin_of(place, kind.begins) if kind.begins else ""
    kills, wrong = [], ""
    try:
        while len(kills) < most:
            kill = drawn(rng)
            start = Start(kind, workdir, init_from, said)
            if not start.kill(kill):
                codes = start.wait()
                break
            codes = start.wait()
            kills.append(kill.phase)
            if "Traceback" in start.told:
                raise RuntimeError(f"{kill}: codes {codes}:\n{start.told}")
            if kill.signal == signal.SIGTERM and not set(codes) <= {75, 0, -15}:
                raise RuntimeError(f"{kill}: codes {codes}:\n{start.told}")
        run_whole(kind, workdir, init_from, said)
        same = asked(
            lambda: not compare(*map(fetched, (workdir, twin_of(place, name))))
        )
        wrong = "" if same else f"{workdir} differs from its twin"
    except (RuntimeError, TimeoutError) as error:
        wrong = str(error)
    if not wrong:
        remove(workdir)
    return Result(name, seed, kills, wrong)


def twin_of(place: str, name: str) -> str:
    return f"{place}/twin-{name}".replace(" ", "-")


# What is compared.


def fetched(place: str) -> epath.Path:
    """The run directory, as a copy of it if it lies in a bucket."""
    if "://" not in place:
        return epath.Path(place)
    import fsspec

    from mim_jax.run import files

    files.place(place)  # sets how buckets are asked
    copy = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    fsspec.filesystem("gs").get(f"{place}/", copy, recursive=True)
    return epath.Path(copy)


def compare(ours: epath.Path, theirs: epath.Path) -> int:
    """0 if two runs ended with the same bits, else 1; says what differs."""
    found = [(arrays(one), rows(one), report(one)) for one in (ours, theirs)]
    for word, mine, other in zip(("state", "metrics", "report"), *found, strict=True):
        if mine != other:
            print(f"{ours}: {word} differs: {_first(mine, other)}", flush=True)
            return 1
    return 0


def _first(mine: Any, other: Any) -> str:
    if isinstance(mine, dict) and mine.keys() == other.keys():
        return next(f"{k}" for k in mine if mine[k] != other[k])
    return f"{str(mine)[:500]} and {str(other)[:500]}"


def arrays(workdir: epath.Path) -> dict[str, bytes]:
    """The bytes of every array of the last checkpoint, read by Orbax alone, and of the
    record beside them."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp
    from absl import logging

    logging.set_verbosity(logging.ERROR)
    folder = workdir / "checkpoints" / str(STEPS)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        leaves = reader.metadata(folder / "state").item_metadata.tree
        # As NumPy arrays, since this process has not the devices of several hosts.
        plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), leaves)
        ask = ocp.args.PyTreeRestore(restore_args=plain)
        tree = reader.restore(folder / "state", args=ask)
    found = {
        jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    return found | {"record": (folder / "about" / "metadata").read_bytes()}


def rows(workdir: epath.Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without times; the last of those of one step."""
    timed = ("images_per_second", "input_wait_share", "evaluation_seconds")
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in row.items() if k not in timed and not k.endswith("/seconds")}
        for row in map(json.loads, lines)
    ]


def report(workdir: epath.Path) -> dict[str, Any]:
    """The numbers of the closing reports, and of those while training."""
    folder = workdir / "report"
    found = [*folder.glob("*.json"), *folder.glob("*/*.json")]
    return {str(path).removeprefix(str(workdir)): path.read_text() for path in found}


# The command.


def soak(
    names: list[str],
    kills: int,
    seed: int,
    place: str,
    folder: pathlib.Path,
    minutes: float = float("inf"),
) -> list[Result]:
    """Disturbs runs of these kinds in turn, until so many kills are done."""
    folder.mkdir(parents=True, exist_ok=True)
    book = folder / "results.jsonl"
    lines = book.read_text().splitlines() if book.exists() else []
    results = [Result(**json.loads(line)) for line in lines]
    end = time.monotonic() + 60 * minutes
    needed = [name for one in names for name in (KINDS[one].begins, one) if name]
    for name in dict.fromkeys(needed):
        twin = twin_of(place, name)
        if not exists(f"{twin}/report/curves.png"):  # which is written last
            if exists(twin):
                remove(twin)
            begins = KINDS[name].begins
            init_from = twin_of(place, begins) if begins else ""
            run_whole(KINDS[name], twin, init_from, folder / "said.txt")
            print(f"twin of {name}", flush=True)
    while (done := sum(len(one.kills) for one in results)) < kills:
        if time.monotonic() > end:
            break
        number = len(results)
        name = names[number % len(names)]
        most = min(KILLS, kills - done)
        result = disturbed(name, f"{seed} {number}", place, folder, most)
        results.append(result)
        with book.open("a") as file:
            file.write(json.dumps(dataclasses.asdict(result)) + "\n")
        said = result.wrong or "bit-exact"
        print(f"{name}: killed at {', '.join(result.kills)}: {said}", flush=True)
    return results


def summary(results: list[Result]) -> str:
    """What the command says in the end."""
    phases = collections.Counter(phase for one in results for phase in one.kills)
    kinds = collections.Counter(one.kind for one in results for _ in one.kills)
    exact = sum(len(one.kills) for one in results if not one.wrong)
    return (
        f"by phase: {', '.join(f'{k} {n}' for k, n in sorted(phases.items()))}\n"
        f"by kind: {', '.join(f'{k} {n}' for k, n in sorted(kinds.items()))}\n"
        f"{exact} of {phases.total()} kills ended bit-exact, in {len(results)} runs"
    )


def prepare(folder: pathlib.Path) -> None:
    """Imports what every run needs, before the first fork; no device is used."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "MPLBACKEND": "agg",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    import mim_jax.main  # noqa: F401

    tasks = [path.read_text().strip() for path in _TASKS.glob("*/comm")]
    # An allocator starts its own thread anew.
    others = [name for name in tasks[1:] if name != "jemalloc_bg_thd"]
    assert not others, f"a fork would lose threads: {others}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--place", default="", help="of run directories; FOLDER/runs")
    parser.add_argument(
        "--serve", action="store_true", help="a bucket, by this machine"
    )
    given = parser.parse_args()
    folder = given.folder.resolve()
    prepare(folder)
    place = given.place or str(folder / "runs")
    if given.serve:
        os.environ |= serve()
        place = "gs://soak/runs"
    results = soak(given.kinds, given.kills, given.seed, place, folder, given.minutes)
    print(summary(results))
    sys.exit(any(one.wrong for one in results))


if __name__ == "__main__":
    main()
