# SPDX-License-Identifier: Apache-2.0
"""The run directory: one process at a time, and one config that does not change."""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import socket
from collections.abc import Iterator

import jax

from mim_jax import config as configs


@contextlib.contextmanager
def claim(workdir: pathlib.Path) -> Iterator[None]:
    """Lock the directory, so that a second run cannot use it meanwhile.

    The lock ends with the block, or with the process, even if that is killed. Of
    several processes of one run, only the first takes the lock.

    Raises:
        ConfigError: another process has the lock (the message names its host and pid),
            or `workdir` is no directory that can be written.
    """
    if "://" in str(workdir) or ":/" in str(workdir):
        raise configs.ConfigError(
            f"workdir={str(workdir)!r}: want a directory of a file system; mount a "
            "bucket first (gcsfuse for gs://)"
        )
    if jax.process_index() != 0:
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / "lock", "a+")
    except OSError as error:
        raise configs.ConfigError(
            f"workdir={str(workdir)!r}: want a directory to write to ({error})"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise configs.ConfigError(
                f"workdir={str(workdir)!r} is in use by {holder}: want one run per "
                "directory"
            ) from None
        lock.truncate(0)
        lock.write(f"{socket.gethostname()} pid {os.getpid()}\n")
        lock.flush()
        yield


def check_config(workdir: pathlib.Path, config: configs.Tree) -> list[str]:
    """Lines "leaf: old -> new" where `config` differs from the one that is saved.

    Leaves that change nothing that is learned may differ and are not listed. If no
    config is saved yet, the list is empty.

    Raises:
        ConfigError: there are such lines and config.on_change is "refuse"; or the saved
            config cannot be read.
    """
    path = workdir / "config.json"
    if not path.exists():
        return []
    changes = configs.difference(configs.load(path), config)
    if changes and config.on_change == "refuse":
        raise configs.ConfigError(
            f"{workdir} holds a run with another config:\n  "
            + "\n  ".join(changes)
            + "\nName another --workdir, or resume with the new values by "
            "--config.on_change=accept"
        )
    return changes


def read_config(workdir: pathlib.Path, named: str) -> configs.Tree:
    """The saved config of a training run. Its data need not be on this machine.

    Args:
        named: how the user named the run, for messages: "run='runs/mae'".
    Raises:
        ConfigError: no training run there, or its config cannot be read.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise configs.ConfigError(
            f"{named}: no config.json there; want the work directory of a training run"
        )
    config = configs.load(path)
    if config.job != "train":
        raise configs.ConfigError(f"{named}: job {config.job!r}; want a training run")
    return config


def write_config(workdir: pathlib.Path, config: configs.Tree) -> None:
    """Write config.json. Call it only once every check of the config has passed."""
    if jax.process_index() != 0:
        return
    path = workdir / "config.json"
    replacement = path.with_suffix(".tmp")
    replacement.write_text(configs.dumps(config))
    replacement.replace(path)


def write_images(workdir: pathlib.Path, ids: tuple[int, ...] | None) -> None:
    """Write images.json, unless it exists: the records that the run learns from.

    Args:
        ids: their positions in the larger source from which they were chosen. None if
            the run reads a whole source: then no file is written.
    """
    path = workdir / "images.json"
    if ids is None or jax.process_index() != 0 or path.exists():
        return
    digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    replacement = path.with_suffix(".tmp")
    replacement.write_text(json.dumps({"sha256": digest, "ids": ids}) + "\n")
    replacement.replace(path)
