# SPDX-License-Identifier: Apache-2.0
"""Job "compare": several runs on one page that opens from disk."""

import base64
import hashlib
import html
import pathlib
import re
from typing import Any

from mim_jax import config as configs
from mim_jax.compare import losses, origins
from mim_jax.compare.sections import gallery, section
from mim_jax.compare.table import table
from mim_jax.evals.base import Eval, caption, drawn
from mim_jax.evals.report import png, save_arrays
from mim_jax.evals.side_by_side import picture, side_by_side
from mim_jax.run import files, loading, notes, rundir
from mim_jax.run.loading import Loaded
from mim_jax.schema import to_json

_PAGE = pathlib.Path(__file__).parent / "page.html"
_GALLERY = "reconstruction"  # the evaluation that the gallery of images is part of


def run(config: configs.Tree, workdir: files.Place) -> None:
    """Measure all of `config.runs` and write workdir/report/index.html.

    Every evaluation brings its own description, headline numbers and figures; the page
    has nothing else to say about it, but for a gallery of the same images with the same
    patches hidden, which stands for the figure of `reconstruction`.

    Raises:
        ConfigError: the config cannot work, or a run cannot be read or compared.
    """
    settings = configs.build(config)
    images = config.data.source
    trained = loading.load_all(settings.runs, settings.step, source=images)
    runs = dict(trained)
    if settings.random:
        first = next(iter(trained.values()))
        random = first.untrained(f"random ({first.run.name})")
        runs[caption(random.run)] = random
    with rundir.claim(workdir, "compare"):
        rundir.write_config(workdir, config)
        names = [f"of          {title}: {one.folder}" for title, one in runs.items()]
        notes.begin(workdir, "\n".join(["compare", *names]))
        folder = workdir / "report"
        files.make(folder)
        sections, results = [], {}
        for name, evaluation in settings.evaluations.items():
            print(f"{name} ...", flush=True)
            reports, reasons = loading.measure(evaluation, runs)
            figures = drawn(evaluation, reports) if reports else {}
            for title, figure in figures.items():
                files.write(folder / f"{title}.png", png(figure))
            save_arrays(folder, name, reports)
            results[name] = reports
            below = ""
            if name == _GALLERY and reports:
                below, figures = _side_by_side(runs, settings, folder), {}
            sections.append(section(name, evaluation, reports, figures, reasons, below))
        logged = {title: losses.logged(one.folder) for title, one in trained.items()}
        curves = losses.curves(trained, logged)
        if curves is not None:
            files.write(folder / "curves.png", png(curves))
        page = _PAGE.read_text()
        for mark, text in {
            "TITLE": ", ".join(html.escape(one.run.name) for one in runs.values()),
            "NAV": _contents(settings.evaluations),
            "TABLE": table(runs, settings.evaluations, results),
            "SECTIONS": "\n".join(sections),
            "CURVES": losses.section(logged, curves),
            "COMMANDS": origins.commands(trained),
            "CONFIGS": origins.differences(trained),
            "WORDS": origins.methods(runs),
            "HASH": _hash(page),
        }.items():
            page = page.replace(f"<!--{mark}-->", text)
        files.write(folder / "index.html", page)
        saved = {
            name: {title: report.described for title, report in reports.items()}
            for name, reports in results.items()
        }
        files.write(workdir / "results.json", to_json(saved, indent=2) + "\n")
        notes.end(workdir, "open report/index.html; results.json has the numbers")
    print(f"open {folder / 'index.html'}", flush=True)


def _hash(page: str) -> str:
    """What the page's policy allows to run: its own script, and no other."""
    (script,) = re.findall("<script>(.*?)</script>", page, re.DOTALL)
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _contents(evaluations: dict[str, Eval]) -> str:
    """Links to the sections."""
    places = {name: name.replace("_", " ") for name in evaluations}
    places |= {"curves": "training loss", "commands": "commands"}
    places |= {"configs": "settings", "words": "words"}
    return "\n".join(
        f"<a href='#{html.escape(place)}'>{html.escape(title)}</a>"
        for place, title in places.items()
    )


def _side_by_side(runs: dict[str, Loaded], settings: Any, folder: files.Place) -> str:
    """The gallery: files in the folder, and a table of images for the page."""
    evaluation = settings.reconstruction
    read = {
        title: (one.run, one.passes.some_held_out(evaluation.rows))
        for title, one in runs.items()
    }
    classes = next(iter(runs.values())).passes.classes
    shown = side_by_side(read, classes, evaluation.seed)
    if shown is None:
        return ""
    files.write(folder / "gallery.png", png(picture(shown)))
    save_arrays(folder, "gallery", shown.reports)
    maskings = {
        repr(getattr(runs[title].run.objective, "masking", None))
        for title in shown.filled
    }
    return gallery(shown, alike=len(maskings) == 1)
