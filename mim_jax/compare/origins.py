# SPDX-License-Identifier: Apache-2.0
"""Where the compared runs come from: their commands, methods and settings."""

import html
import inspect

from mim_jax.run import notes, rundir
from mim_jax.run.loading import Loaded


def commands(trained: dict[str, Loaded]) -> str:
    """The commands of the runs, and that of this page."""
    lines = ["<dl>"]
    for title, one in trained.items():
        lines.append(f"<dt>{html.escape(title)}</dt>")
        command = notes.command_of(one.folder)
        lines.append(
            f"<dd><pre>{html.escape(command)}</pre></dd>"
            if command
            else "<dd>Its directory names no command; its config.json has every "
            "setting.</dd>"
        )
    lines += [
        "<dt>this page</dt>",
        f"<dd><pre>{html.escape(notes.command())}</pre></dd>",
        "</dl>",
        "<p><b>To make this page again</b>: run the commands of the runs, then that of "
        "the page, all in the folder in which they were run before. Where the models "
        "are still there, the page's command is enough: it measures them anew, and "
        "writes this file in the same place.</p>",
    ]
    return "\n".join(lines)


def methods(runs: dict[str, Loaded]) -> str:
    """The methods of the table, each in the first sentence of its own documentation."""
    kinds = dict.fromkeys(type(one.run.objective) for one in runs.values())
    lines = []
    for kind in kinds:
        words = (inspect.getdoc(kind) or "").partition("\n\n")[0]
        text = html.escape(" ".join(words.split()))
        lines.append(f"<dt>{html.escape(kind.__name__)}</dt><dd>{text}</dd>")
    return "\n".join(lines)


def differences(trained: dict[str, Loaded]) -> str:
    """The config leaves that differ between runs."""
    flat = [_flat(rundir.saved_config(one.folder) or {}) for one in trained.values()]
    names = sorted(set().union(*flat))
    lines = ["<thead><tr><th scope='col'>config</th>"]
    lines += [f"<th scope='col'>{html.escape(title)}</th>" for title in trained]
    lines.append("</tr></thead><tbody>")
    for name in names:
        values = [one.get(name, "–") for one in flat]
        if len({repr(value) for value in values}) > 1:
            cells = "".join(f"<td>{html.escape(str(value))}</td>" for value in values)
            lines.append(f"<tr><th scope='row'>{html.escape(name)}</th>{cells}</tr>")
    return "\n".join([*lines, "</tbody>"])


def _flat(tree: dict, above: str = "") -> dict[str, object]:
    """Leaves by dotted path."""
    found = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{above}{name}.")
        else:
            found[above + name] = value
    return found
