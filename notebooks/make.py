# SPDX-License-Identifier: Apache-2.0
"""Runs the notebooks of this folder, and stores what they print and draw.

    pip install -e '.[notebook]'
    python notebooks/make.py                       # all of them
    python notebooks/make.py quickstart occlusion  # some
    python notebooks/make.py --links               # only the cells named below

Each runs from top to bottom in a fresh kernel, with this folder as its working
directory. What would differ in the next run for no reason is left out of the stored
outputs: the pace of training, times, the version of the kernel. A notebook that raises,
writes to stderr or prints an absolute path is not stored.

Two cells are not written by hand, since they name where the repository is: "badge", and
"install". They follow from project.urls of pyproject.toml; while no address on GitHub
stands there, there is no badge.
"""

import argparse
import pathlib
import re
import sys
import time
import tomllib
from collections.abc import Mapping

import nbformat
from nbclient import NotebookClient

FOLDER = pathlib.Path(__file__).parent
KERNEL = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
# What training prints of its pace, and an evaluation that takes over half a minute.
_PACE = re.compile(r"  \d+ images/s  [\d:?]+ left$", re.MULTILINE)
_PATIENCE = re.compile(r"(.+: \d+( of \d+)? images\n)+")
_ABSOLUTE = re.compile(
    r"(?<![\w.:/])(/(tmp|root|home|usr|opt|var|mnt|Users)/|[A-Z]:\\)"
)
_BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
_COLAB = "https://colab.research.google.com/github"
_INSTALL = """\
import sys

if "google.colab" in sys.modules:  # elsewhere this cell does nothing
    !{fetch} && pip install -q ./repository"""
_WHERE = """\
**To run it** on your machine, type `pip install -e '.[notebook]'` and `jupyter lab` in
the folder of the repository, and open this file. **In Colab**, {first}; a CPU runtime
is enough. If Colab asks to restart the runtime after the next cell, do so, and run that
cell again."""


def repository() -> str:
    """Where the repository is on GitHub; "" while pyproject.toml does not say."""
    with open(FOLDER.parent / "pyproject.toml", "rb") as file:
        return address(tomllib.load(file)["project"].get("urls", {}))


def address(urls: Mapping[str, str]) -> str:
    """The first address of a repository on GitHub, without what may follow its name.

    Example:
        >>> address({"Documentation": "https://a.org", "Source": "https://github.com/a/b/"})
        'https://github.com/a/b'
    """
    for url in urls.values():
        found = re.match(r"https://github\.com/[\w.-]+/[\w.-]+", url)
        if found:
            return found[0].removesuffix(".git")
    return ""


def link(notebook: nbformat.NotebookNode, name: str, url: str) -> None:
    """Writes the cells that name the repository.

    Args:
        name: of the file, without its suffix.
        url: of the repository, or "".
    """
    cells = [cell for cell in notebook.cells if cell.id != "badge"]
    named = {cell.id: cell for cell in cells}
    if url:
        there = f"{_COLAB}{url.removeprefix('https://github.com')}"
        to = f"{there}/blob/main/notebooks/{name}.ipynb"
        text = f"[![Open in Colab]({_BADGE})]({to})"
        cells.insert(1, nbformat.v4.new_markdown_cell(text, id="badge"))
        first = "open it by the badge above"
        fetch = f"[ -d repository ] || git clone -q {url} repository"
    else:
        first = (
            "first make a zip file of the repository, `git archive "
            "--output=mim_jax.zip HEAD`, and upload it to the files at the left"
        )
        fetch = "unzip -qo mim_jax.zip -d repository"
    named["where"].source = _WHERE.format(first=first)
    named["install"].source = _INSTALL.format(fetch=fetch)
    notebook.cells = cells


def run(notebook: nbformat.NotebookNode) -> None:
    """Executes all cells in a fresh kernel, and keeps their outputs.

    Raises:
        CellExecutionError: a cell raised.
        ValueError: an output must not be stored; the message says which.
    """
    where = {"metadata": {"path": str(FOLDER)}}
    # Times of cells would change every time.
    NotebookClient(
        notebook, timeout=900, resources=where, record_timing=False
    ).execute()
    tidy(notebook)


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Leaves out of the outputs what differs from run to run.

    Raises:
        ValueError: an output has an error, something on stderr, or an absolute path.
    """
    notebook.metadata = nbformat.from_dict(KERNEL)
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type == "code":
            cell.outputs = [
                one
                for one in _joined(cell.outputs)
                if not (one.get("name") == "stderr" and _PATIENCE.fullmatch(one.text))
            ]
        for output in cell.get("outputs", []):
            if output.output_type == "error" or output.get("name") == "stderr":
                raise ValueError(f"cell {cell.id!r} wrote an error: {output}")
            text = _text(output)
            if _ABSOLUTE.search(text):
                raise ValueError(f"cell {cell.id!r} printed an absolute path: {text}")
            if "text" in output:
                output.text = _PACE.sub("", output.text)


def _joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """The outputs, with the parts in which a text arrived put together."""
    found: list[nbformat.NotebookNode] = []
    for output in outputs:
        last = found[-1] if found else {}
        if "name" in output and output.name == last.get("name"):
            last["text"] += output.text
        else:
            found.append(output)
    return found


def _text(output: nbformat.NotebookNode) -> str:
    """All that can be read of an output."""
    data = output.get("data", {})
    return output.get("text", "") + "".join(
        str(value) for kind, value in data.items() if kind != "image/png"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="notebooks; default: all")
    parser.add_argument("--links", action="store_true", help="run nothing")
    options = parser.parse_args()
    known = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    names = [name.removesuffix(".ipynb") for name in options.names] or known
    if unknown := set(names) - set(known):
        print(f"error: no notebook {min(unknown)!r}; known: {', '.join(known)}")
        return 2
    for name in names:
        path, began = FOLDER / f"{name}.ipynb", time.monotonic()
        notebook = nbformat.read(path, as_version=4)
        link(notebook, name, repository())
        if not options.links:
            run(notebook)
        nbformat.write(notebook, path)
        size = path.stat().st_size / 1e3
        print(f"{name}: {time.monotonic() - began:.0f} s, {size:.0f} kB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
