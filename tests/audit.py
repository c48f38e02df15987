# SPDX-License-Identifier: Apache-2.0
"""What a program does to files, and which code it runs, by Python's audit events."""

import contextlib
import functools
import hashlib
import os
import pathlib
import sys

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {
    *("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink"),
    *("os.truncate", "os.chmod", "os.chown", "shutil.rmtree"),
}
_PROCESSES = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"}
_seen: list[tuple[str, str]] | None = None  # a hook cannot be removed


def _hook(event: str, arguments: tuple) -> None:
    if _seen is None:
        return
    if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        if arguments[2] & _WRITING:
            _seen.append((event, os.fsdecode(arguments[0])))
    elif event in _CHANGES and isinstance(arguments[0], str | bytes | os.PathLike):
        _seen.append((event, os.fsdecode(arguments[0])))
    elif event == "exec":
        _seen.append((event, getattr(arguments[0], "co_filename", "")))
    elif event in _PROCESSES:
        _seen.append((event, str(arguments[0])))


@functools.cache
def _listen() -> None:
    sys.addaudithook(_hook)


def content(folder: pathlib.Path) -> dict[str, str]:
    """A digest of each file below a folder, and each folder, by its path."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in folder.rglob("*")
    }


@contextlib.contextmanager
def only_reads(run: pathlib.Path, out: pathlib.Path):
    """Inside this block nothing of `run` changes and no code of it runs, files are
    written below `out` alone, and no process is started."""
    global _seen
    _listen()
    before, bytecode = content(run), sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    _seen = []
    try:
        yield
    finally:
        seen, _seen = _seen, None
        sys.dont_write_bytecode = bytecode
    assert content(run) == before
    for event, what in seen:
        if event in _PROCESSES or event == "exec":
            inside = pathlib.Path(what).is_relative_to(run)
            assert event == "exec" and not inside, (event, what)
        else:
            path = pathlib.Path(what)
            # Batches travel in shared memory.
            allowed = path.is_relative_to(out) or path.is_relative_to("/dev")
            assert allowed, (event, what)
