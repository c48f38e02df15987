# SPDX-License-Identifier: Apache-2.0
"""Builds the documentation site, which needs no network, neither here nor when read.

    pip install -e '.[docs]'
    python docs/make_site.py site && open site/index.html

Pages of docs/ and README.md are read on GitHub, too, where a link may lead to any file
of the repository. On the site such a file is a page of its own. A warning is an error.
"""

import base64
import json
import pathlib
import posixpath
import re
import shutil
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
# Pages that lie at the root of the repository, and their names on the site.
AT_ROOT = {
    "README.md": "readme.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
# Pages of the reference: what each documents.
REFERENCE = {
    "Use a model": ("mim_jax.interop.pretrained",),
    "Configs": ("mim_jax.config", "mim_jax.schema"),
    "Bases of plug-ins": (
        *("mim_jax.objectives.base", "mim_jax.maskings.base"),
        *("mim_jax.tokenizers.base", "mim_jax.data.sources.base"),
        *("mim_jax.data.examples.base", "mim_jax.evals.base"),
        *("mim_jax.evals.report", "mim_jax.kernels.base"),
    ),
    "Networks": ("mim_jax.models.vit", "mim_jax.models.decoder"),
    "Functions of arrays": (
        *("mim_jax.ops.masking", "mim_jax.ops.patches", "mim_jax.ops.similarity"),
        *("mim_jax.ops.cka", "mim_jax.ops.losses", "mim_jax.ops.posembed"),
    ),
    "Theory": ("mim_jax.theory.locating", "mim_jax.theory.trees"),
}
# The list of contents: caption, pages.
CONTENTS = {
    "": ("concepts",),
    "The papers": (
        *("papers", "studies", "claims", "theory", "occlusion", "deviations"),
    ),
    "Guides": (
        *(
            "Everything at a glance <readme>",
            "explore",
            "data",
            "contributing",
            "weights",
        ),
        *("gpu", "colab", "pods", "reliability", "security", "limits"),
    ),
    "Notebooks": (
        *("notebooks/quickstart", "notebooks/own_photographs"),
        *("notebooks/occlusion", "notebooks/masks_and_theory"),
        *("notebooks/published_checkpoint", "notebooks/own_objective"),
    ),
    "Results": ("mnist", "digits", "cmae", "photos", "detection", "performance"),
    "The code": ("architecture", "reference", "changelog"),
}
# Without the titles that some have in the list of contents.
PAGES = [
    one.rpartition("<")[2].rstrip(">") for below in CONTENTS.values() for one in below
]
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_LANGUAGES = {".py": "python", ".sh": "bash"}
_FENCE = "`" * 6  # no text has so many


def staged(folder: pathlib.Path) -> None:
    """Writes the pages of the site, as Markdown, into an empty folder."""
    texts = {
        path.relative_to(ROOT).as_posix(): path.read_text()
        for path in [*(ROOT / "docs").rglob("*.md"), *map(ROOT.joinpath, AT_ROOT)]
        if "cells" not in path.parts
    }
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        texts[path.relative_to(ROOT).as_posix()] = _read_notebook(path, folder)
    waiting, done = dict(texts), {}
    for source, text in waiting.items():
        name = _name(source)
        for _, link, _ in _LINK.findall(text):
            path = _path(source, link)
            if path and path not in texts and not path.endswith((".png", ".svg")):
                done[_name(path)] = _shown(path)
        done[name] = _moved(source, name, text)
    for title, modules in REFERENCE.items():
        done[f"reference/{title.lower().replace(' ', '_')}.md"] = _documented(
            title, modules
        )
    names = sorted(name for name in done if name.startswith("reference/"))
    done["reference.md"] = (
        "# Reference\n\nFrom the docstrings of the code.\n\n"
        + _toctree("", [name.removesuffix(".md") for name in names])
    )
    done["index.md"] += "\n" + "\n".join(_toctree(*item) for item in CONTENTS.items())
    for name, text in done.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        listed = name.removesuffix(".md") in PAGES
        if not listed and name != "index.md" and not name.startswith("reference/"):
            text = f"---\norphan: true\n---\n\n{text}"
        (folder / name).write_text(text)
    for path in (ROOT / "docs").rglob("*.*g"):
        to = folder / path.relative_to(ROOT / "docs")
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to)
    shutil.copy(ROOT / "docs" / "conf.py", folder)


def _moved(source: str, name: str, text: str) -> str:
    """The text of a page with its links as they are on the site."""

    def moved(match):
        path = _path(source, match[2])
        if path is None:
            return match[0]
        to = posixpath.relpath(_name(path), posixpath.dirname(name) or ".")
        return match[1] + to + match[3]

    return _LINK.sub(moved, text)


def _path(source: str, link: str) -> str | None:
    """The file of the repository that a link of a page leads to; None if none."""
    if "://" in link or link.startswith("mailto:"):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return path if (ROOT / path).exists() else None


def _name(path: str) -> str:
    """What a file of the repository is called on the site."""
    if path in AT_ROOT:
        return AT_ROOT[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.endswith(".ipynb"):
        return path.removesuffix("ipynb") + "md"
    return f"source/{path}.md"


def _shown(path: str) -> str:
    """A page that shows a file, or lists a folder."""
    place = ROOT / path
    if place.is_dir():
        names = sorted(one.name for one in place.iterdir() if one.name[0] not in "._")
        return f"# {path}\n\n" + "\n".join(f"* `{name}`" for name in names) + "\n"
    language = _LANGUAGES.get(place.suffix, "text")
    return f"# {path}\n\n" + _fenced(place.read_text(), language)


def _fenced(text: str, language: str = "text") -> str:
    return f"{_FENCE}{language}\n{text.rstrip()}\n{_FENCE}\n"


def _read_notebook(path: pathlib.Path, folder: pathlib.Path) -> str:
    """A notebook with its stored outputs as Markdown; writes its pictures."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text + "\n")
            continue
        # Lines of IPython's own are no Python, and would be a warning.
        magic = re.search(r"^\s*[%!]", text, re.MULTILINE)
        parts.append(_fenced(text, "text" if magic else "python"))
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                picture = pathlib.Path("notebooks", path.stem, f"{len(parts)}.png")
                (folder / picture).parent.mkdir(parents=True, exist_ok=True)
                (folder / picture).write_bytes(base64.b64decode(data["image/png"]))
                where = picture.relative_to("notebooks").as_posix()
                parts.append(f"![output of the cell above]({where})\n")
            else:
                shown = output.get("text") or data["text/plain"]
                parts.append(_fenced("".join(shown)))
    return "\n".join(parts)


def _documented(title: str, modules: tuple[str, ...]) -> str:
    parts = [
        f"## {name}\n\n```{{eval-rst}}\n.. automodule:: {name}\n```\n"
        for name in modules
    ]
    return "\n".join([f"# {title}\n", *parts])


def _toctree(title: str, names) -> str:
    caption = f":caption: {title}\n" if title else ""
    return f"```{{toctree}}\n:hidden:\n{caption}\n" + "\n".join(names) + "\n```\n"


def main() -> int:
    """Builds the site into the folder that the command line names."""
    from sphinx.cmd.build import build_main

    (target,) = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        staged(pathlib.Path(folder))
        return build_main(
            ["-W", "--keep-going", "-q", "-E", "-b", "html", folder, target]
        )


if __name__ == "__main__":
    sys.exit(main())
