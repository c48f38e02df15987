# SPDX-License-Identifier: Apache-2.0
"""The lock of a run directory in a bucket: a file that its owner renews."""

import contextlib
import os
import pathlib
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from etils import epath

from mim_jax.run import buckets

# Seconds after which the owner renews it, and after which one that was not is free.
_RENEWED, _EXPIRED = 20.0, 100.0


class HeldError(Exception):
    """Another process has the lock; the message says which."""


@contextlib.contextmanager
def lease(file: epath.Path) -> Iterator[str]:
    """Hold the lock, which the file is; inside the block a thread renews it.

    The file of an owner that was killed stays. It is taken over at once if that was a
    process of this machine, and otherwise once it has not been renewed for 100 s.

    Yields:
        What the file says. While it says so, the lock is this process's.
    Raises:
        HeldError: another process renews it.
        ConfigError: the file cannot be written.
        DiskError: the bucket does not answer.
    """
    mine = (
        f"{socket.gethostname()} pid {os.getpid()}\n"
        f"{_processes()} {secrets.token_hex(8)}\n"
    )
    with contextlib.ExitStack() as stack:
        with buckets.refusing(file):
            # Of its own, since the thread uses it.
            client = stack.enter_context(contextlib.closing(buckets.new_client()))
            lock = buckets.blob_of(file, client)
            renewal = _Renewal(lock, mine, _taken(lock, mine))
        renewal.start()
        stack.callback(renewal.end)
        yield mine


def _taken(lock: Any, mine: str) -> int:
    """Take the lock; returns the generation of its file."""
    from google.api_core.exceptions import NotFound

    seen, since = 0, time.monotonic()
    while True:
        with contextlib.suppress(buckets.ChangedError):
            return buckets.put(lock, mine.encode(), 0)
        with contextlib.suppress(NotFound, buckets.ChangedError):
            data, generation = buckets.content(lock)
            holder = data.decode(errors="replace")
            owner = holder.partition("\n")[0]
            if seen not in (0, generation):
                raise HeldError(owner)
            if not seen:
                seen = generation
                _say(f"{owner} had the lock of this directory; looking if it still has")
            if time.monotonic() - since > _EXPIRED or _has_ended(holder):
                return buckets.put(lock, mine.encode(), seen)
        time.sleep(_RENEWED / 20)


class _Renewal(threading.Thread):
    """Renews a lock until `end`, which gives it back."""

    def __init__(self, lock: Any, mine: str, generation: int):
        super().__init__(name="lease", daemon=True)
        self._lock, self._mine, self._generation = lock, mine, generation
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(_RENEWED):
            try:
                data = self._mine.encode()
                self._generation = buckets.put(self._lock, data, self._generation)
            except buckets.ChangedError:
                return  # it is another's; the run reads that before it saves
            except Exception:  # the network, for example: the lock is ours until then
                continue

    def end(self) -> None:
        self._over.set()
        self.join(buckets.FIRST)
        retry = buckets.retry(buckets.FIRST)
        with contextlib.suppress(Exception):  # then it expires
            self._lock.delete(if_generation_match=self._generation, retry=retry)


def _has_ended(holder: str) -> bool:
    """Whether the owner was a process of this machine that is no more."""
    owner, _, about = holder.partition("\n")
    pid = owner.rpartition(" ")[2]
    if not about.startswith(f"{_processes()} ") or not pid.isdigit() or len(pid) > 9:
        return False
    try:
        os.kill(int(pid), 0)  # /proc may hide the processes of other users
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    return False


def _processes() -> str:
    """What tells apart the processes that this one can see from those of others: the
    start of the machine, and of the container."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux: then nobody is told from anybody
        return secrets.token_hex(8)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
