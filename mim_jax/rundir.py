# SPDX-License-Identifier: Apache-2.0
"""The run directory: one process at a time, one configuration for good."""

import contextlib
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator

from ml_collections import config_dict

from mim_jax import config as configs


@contextlib.contextmanager
def claim(workdir: pathlib.Path) -> Iterator[None]:
    """Hold the directory against a second run; released even by a killed process.

    Raises:
        ConfigError: another process holds it, named by host and pid.
    """
    if "://" in str(workdir) or ":/" in str(workdir):
        raise configs.ConfigError(
            f"workdir={str(workdir)!r}: want a directory of a file system; mount a "
            "bucket first (gcsfuse for gs://)"
        )
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / "lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise configs.ConfigError(
                f"workdir={str(workdir)!r} is in use by {lock.read().strip()}: want one "
                "run per directory"
            ) from None
        lock.truncate(0)
        lock.write(f"{socket.gethostname()} pid {os.getpid()}\n")
        lock.flush()
        yield


def settle_config(workdir: pathlib.Path, config: config_dict.ConfigDict) -> None:
    """Write config.json, or hold the new config against the one that is there.

    Raises:
        ConfigError: they differ in what is learned, and config.on_change is "refuse".
    """
    path = workdir / "config.json"
    if path.exists():
        changes = configs.difference(configs.load(path), config)
        if changes and config.on_change == "refuse":
            raise configs.ConfigError(
                f"{workdir} holds a run with another config:\n  "
                + "\n  ".join(changes)
                + "\nName another --workdir, or resume with the new values by "
                "--config.on_change=accept"
            )
    replacement = path.with_suffix(".tmp")
    replacement.write_text(configs.dumps(config))
    replacement.replace(path)
