# SPDX-License-Identifier: Apache-2.0
"""summary.txt: what a run directory is, for a person who finds it later."""

import datetime
import pathlib
import shlex
import sys

import jax

import mim_jax
from mim_jax.run import files

_NAME = "summary.txt"
_RESULT = "\nresult\n"
_COMMAND, _LONGEST = "command", 4000  # characters that are shown
_OF_OURS = {"main.py": "python -m mim_jax.main", "__main__.py": "python -m mim_jax"}


def begin(workdir: files.Place, what: str, line: str = "") -> None:
    """Write what a job is about to do, on the first host.

    Args:
        what: lines on its settings, data and devices.
        line: the command line; "" is this process's.
    """
    if jax.process_index() != 0:
        return
    files.write(
        workdir / _NAME,
        f"{_COMMAND}     {line or command()}\n"
        f"started     {datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %Z}\n"
        f"versions    mim_jax {mim_jax.__version__}, jax {jax.__version__}, Python "
        f"{sys.version.split()[0]}, {jax.devices()[0].device_kind}\n"
        f"{what.rstrip()}\n"
        "settings    all of them are in config.json\n",
    )


def end(workdir: files.Place, result: str) -> None:
    """Add what came of it, in place of an earlier result."""
    path = workdir / _NAME
    before = files.read(path).decode(errors="replace") if files.exists(path) else ""
    before = before.partition(_RESULT)[0]
    files.write(path, f"{before}{_RESULT}{result.rstrip()}\n")


def command_of(workdir: files.Place) -> str:
    """The command that a directory says it was made by; "" if it says nothing.

    The text is whatever somebody wrote there: it is to be shown, and never to be run. A
    character that cannot be seen, such as one that turns the direction of writing, is
    replaced.
    """
    path = workdir / _NAME
    text = files.read(path).decode(errors="replace") if files.exists(path) else ""
    start, _, rest = text.partition("\n")[0].partition(" ")
    found = rest.strip()[:_LONGEST] if start == _COMMAND else ""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in found)


def command() -> str:
    """The command line of this process, as a shell reads it."""
    program, *words = sys.argv or [""]
    path = pathlib.Path(program)
    ours = path.parent.resolve() == pathlib.Path(mim_jax.__file__).parent
    name = _OF_OURS[path.name] if ours and path.name in _OF_OURS else program
    return " ".join([name, *map(shlex.quote, words)])
