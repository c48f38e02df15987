# SPDX-License-Identifier: Apache-2.0
"""The run directory: one job, one process at a time, one config that stays."""

import contextlib
import fcntl
import hashlib
import os
import pathlib
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

import jax

from mim_jax import config as configs
from mim_jax.run import files, hosts, storage
from mim_jax.run.digests import DamageError
from mim_jax.run.lease import HeldError, lease
from mim_jax.schema import to_json

_CALLED = {
    "train": "a training run",
    "eval": "an evaluation",
    "compare": "a comparison",
    "explore": "a page to explore",
    "study": "a study",
}
_SOON = 30  # seconds in which a network disk shows a file of another host
# Orbax and tensorstore take a backslash for a slash, and match names by patterns.
_UNREADABLE, _UNWRITABLE = "\\", "\\*?[]"


class InUseError(configs.ConfigError):
    """Another process has the lock of a directory."""


class NotSharedError(configs.ConfigError):
    """The hosts of a run see different directories."""


class Claim:
    """A directory that this process has locked; on hosts but the first, nothing."""

    def __init__(self, workdir: files.Place, mine: str | None):
        self._workdir, self._mine = workdir, mine

    def check(self) -> None:
        """Raise unless the directory is still where it was, and still this process's.

        Raises:
            DiskError: it was moved or deleted, or another process has the place.
        """
        if self._mine is None:
            return
        try:
            found = files.read(self._workdir / "lock").decode(errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            found = None
        except (OSError, files.DiskError):
            return  # nobody can tell now; what is written there will
        # Where a bucket is mounted, a file that is open may look empty.
        if found is None or found not in ("", self._mine):
            now = f"belongs to {_owner(found)}" if found else "is no longer there"
            raise files.DiskError(
                f"workdir={str(self._workdir)!r} {now}: it was moved or deleted while "
                "this run used it, so nothing more is saved; where it was moved, the "
                "same command with its new place goes on from the newest checkpoint"
            )


@contextlib.contextmanager
def claim(workdir: files.Place, job: str | None = None) -> Iterator[Claim]:
    """Lock the directory for a job, so that no other can use it meanwhile.

    The lock ends with the block, or with the process, even if that is killed (in a
    bucket some time later: `mim_jax.run.lease`). Of several processes of one run, only
    the first takes the lock.

    Args:
        job: which writes there; None: the folder serves as a lock alone.
    Raises:
        InUseError: another process has the lock; names its host and pid.
        ConfigError: `workdir` is no directory that can be written, holds what another
            job wrote, or leads out of itself (`files.check`).
    """
    _check_name(workdir, _UNWRITABLE)
    if job is None:
        files.check(workdir)
    else:
        _check_job(workdir, job)
    if jax.process_index() != 0:
        yield Claim(workdir, None)
        return
    with contextlib.ExitStack() as held:
        try:
            mine = held.enter_context(_lock(workdir))
        except HeldError as error:
            raise InUseError(
                f"workdir={str(workdir)!r} is in use by {error}: want one run per "
                "directory"
            ) from None
        yield Claim(workdir, mine)


@contextlib.contextmanager
def _lock(workdir: files.Place) -> Iterator[str]:
    """Hold the lock of a directory, and say in it who has it; yields that text.

    Raises:
        HeldError: another process has it.
        ConfigError: as `claim`.
    """
    if not isinstance(workdir, pathlib.Path):
        with lease(workdir / "lock") as mine:
            yield mine
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = files.append(workdir / "lock")
    except OSError as error:
        raise configs.ConfigError(
            f"workdir={str(workdir)!r}: want a directory to write to ({error})"
        ) from error
    with file:
        yield _locked(file, workdir)


def _owner(lock: str) -> str:
    """The process that a lock names."""
    return lock.strip().partition("\n")[0]


def _locked(lock: BinaryIO, workdir: pathlib.Path) -> str:
    """Take the lock of a file system and write who has it; returns that text."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        holder = lock.read().decode(errors="replace")
        raise HeldError(_owner(holder) or "another process") from None
    if os.fstat(lock.fileno()).st_nlink > 1:
        raise configs.ConfigError(
            f"{workdir / 'lock'} is another file, too (a hard link): want it deleted"
        )
    mine = f"{socket.gethostname()} pid {os.getpid()}\n"
    try:
        lock.truncate(0)
        lock.write(mine.encode())
        lock.flush()
    except OSError as error:
        raise files.DiskError(f"{workdir / 'lock'}: {error}") from error
    return mine


def check_shared(workdir: files.Place) -> None:
    """Refuse hosts of one run that have a directory each. All hosts must call this at
    the same point, once the first host has claimed the directory.

    Raises:
        NotSharedError: a host does not see what the first one writes; on all hosts.
    """
    if jax.process_count() == 1:
        return
    # A name that is new each time: no host can know by heart that it is missing.
    (number,) = hosts.from_first_host([secrets.randbelow(2**31)], "the token")
    token, first = workdir / f"hosts-{number}.token", jax.process_index() == 0
    if first:
        for old in files.names(workdir):  # of a start that was killed
            if old.startswith("hosts-") and old.endswith(".token"):
                files.remove_file(workdir / old)
        files.write(token, "hosts that do not see this file have another directory\n")
    hosts.from_hosts(0, "the token to be written")
    seen = hosts.from_hosts(first or _appears(token), "whether the token is seen")
    where = f"{socket.gethostname()}:{files.absolute(workdir)}"
    places = hosts.texts_of_hosts(where)
    if first:
        files.remove_file(token)
    if not all(seen):
        other = seen.index(0)
        raise NotSharedError(
            f"--workdir: host 0 writes to {places[0]}, and host {other} does not see "
            f"that in {places[other]}: want one directory for all hosts, in a bucket "
            "or on a network disk"
        )


def _appears(path: files.Place) -> bool:
    """Whether a file of another host is there, or comes soon."""
    end = time.monotonic() + _SOON
    while not files.exists(path):
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def _check_name(workdir: files.Place, unwanted: str) -> None:
    path = str(workdir if files.in_bucket(workdir) else workdir.absolute())
    if ":/" in path.removeprefix("gs://"):
        raise configs.ConfigError(
            f"workdir={str(workdir)!r}: want a directory, or gs://BUCKET/FOLDER"
        )
    found = [mark for mark in unwanted if mark in path]
    if any("\udc80" <= mark <= "\udcff" for mark in path):  # Python's sign for it
        found.append("bytes that are no UTF-8")
    if found:
        raise configs.ConfigError(
            f"workdir={path!r} has {' and '.join(found)}: the library that writes "
            "checkpoints cannot name files there; want another directory"
        )


def _check_job(workdir: files.Place, job: str) -> None:
    saved = saved_config(workdir)
    there = job if saved is None else str(saved["job"])
    if saved is None and files.exists(workdir / "checkpoints"):
        there = "train"  # which has lost its config.json
    if there != job:
        raise configs.ConfigError(
            f"workdir={str(workdir)!r} holds {_CALLED.get(there, there)}, and this job "
            f"is {_CALLED[job]}: want another --workdir"
        )


def saved_config(folder: files.Place) -> dict[str, Any] | None:
    """The config of the job that wrote to a directory, as JSON: from config.json or,
    where that is missing, from the newest checkpoint that can be read. None: there is
    no such job.

    Raises:
        ConfigError: config.json is damaged or somebody else's, or it is missing and the
            checkpoints hold no config, since an older version wrote them; or the
            directory leads out of itself (`files.check`).
    """
    files.check(folder)
    path, checkpoints = folder / "config.json", folder / "checkpoints"
    if files.exists(path):
        try:
            saved = files.read_json(path)
        except configs.ConfigError as error:
            raise configs.ConfigError(
                f"{error}; want it put back or, where the checkpoints are of this "
                "version, deleted: they hold the config, too"
            ) from error
        if not _is_config(saved):
            raise configs.ConfigError(
                f"{path} is no config of mim_jax: want another directory"
            )
        return saved
    for step in reversed(storage.steps_on_disk(checkpoints)):
        try:
            saved = storage.read_record(checkpoints, step)["extra"].get("config")
        except DamageError:
            continue
        if not _is_config(saved):
            raise configs.ConfigError(
                f"{path} is missing, and the checkpoint of step {step}, of an older "
                "version, holds no config: want that file put back"
            )
        return saved
    return None


def _is_config(saved: Any) -> bool:
    return isinstance(saved, dict) and "job" in saved


def check_config(workdir: files.Place, config: configs.Tree) -> list[str]:
    """Lines "leaf: old -> new" where `config` differs from the one that is saved.

    Leaves that change nothing that is learned may differ and are not listed. If no
    config is saved yet, the list is empty.

    Raises:
        ConfigError: there are such lines and config.on_change is "refuse"; or the saved
            config cannot be read.
    """
    saved = saved_config(workdir)
    if saved is None:
        return []
    before = configs.filled(saved, str(workdir / "config.json"))
    changes = configs.difference(before, config)
    if changes and config.on_change == "refuse":
        raise configs.ConfigError(
            f"{workdir} holds a run with another config:\n  "
            + "\n  ".join(changes)
            + "\nName another --workdir, or resume with the new values by "
            "--config.on_change=accept"
        )
    return changes


def read_config(workdir: files.Place, named: str) -> configs.Tree:
    """The saved config of a training run. Its data need not be on this machine.

    Args:
        named: how the user named the run, for messages: "run='runs/mae'".
    Raises:
        ConfigError: no training run there, its config cannot be read, or the directory
            leads out of itself (`files.check`).
    """
    _check_name(workdir, _UNREADABLE)
    saved = saved_config(workdir)
    if saved is None:
        raise configs.ConfigError(
            f"{named}: no config.json there; want the work directory of a training run"
        )
    config = configs.filled(saved, str(workdir / "config.json"))
    if config.job != "train":
        raise configs.ConfigError(f"{named}: job {config.job!r}; want a training run")
    return config


def write_config(workdir: files.Place, config: configs.Tree) -> None:
    """Write config.json. Call it only once every check of the config has passed."""
    if jax.process_index() == 0:
        files.write(workdir / "config.json", configs.dumps(config))


def write_images(workdir: files.Place, ids: tuple[int, ...] | None) -> None:
    """Write images.json: the records that the run learns from. If the file is there
    and lists others, somebody changed it: say so, and write it anew.

    Args:
        ids: their positions in the larger source from which they were chosen. None if
            the run reads a whole source: then no file is written.
    """
    if ids is None or jax.process_index() != 0:
        return
    path = workdir / "images.json"
    digest = hashlib.sha256(to_json(ids).encode()).hexdigest()
    right = {"sha256": digest, "ids": list(ids)}
    if files.exists(path):
        with contextlib.suppress(configs.ConfigError):
            if files.read_json(path) == right:
                return
        print(
            f"WARNING: {path} was changed and did not list what this run learns from; "
            "now it does again",
            file=sys.stderr,
            flush=True,
        )
    files.write(path, to_json(right) + "\n")
