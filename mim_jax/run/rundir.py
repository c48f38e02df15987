# SPDX-License-Identifier: Apache-2.0
"""The run directory: one process at a time, one configuration for good."""

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
    """Hold the directory against a second run; released even by a killed process.

    Of several processes of one run the first holds it for all.

    Raises:
        ConfigError: another process holds it, named by host and pid.
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
    """What the config changes in a run that is there already, leaf by leaf.

    Raises:
        ConfigError: that is something, and config.on_change is "refuse"; or the saved
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


def write_config(workdir: pathlib.Path, config: configs.Tree) -> None:
    """Write config.json; call it once nothing can refuse the config any more."""
    if jax.process_index() != 0:
        return
    path = workdir / "config.json"
    replacement = path.with_suffix(".tmp")
    replacement.write_text(configs.dumps(config))
    replacement.replace(path)


def write_images(workdir: pathlib.Path, ids: tuple[int, ...] | None) -> None:
    """Write images.json, once: which records of a larger source the run learns from.

    Args:
        ids: their positions there; None, where a source is read in full: no file.
    """
    path = workdir / "images.json"
    if ids is None or jax.process_index() != 0 or path.exists():
        return
    digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    replacement = path.with_suffix(".tmp")
    replacement.write_text(json.dumps({"sha256": digest, "ids": ids}) + "\n")
    replacement.replace(path)
