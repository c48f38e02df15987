# SPDX-License-Identifier: Apache-2.0
"""Job "compare": several runs on one page that opens from disk."""

import base64
import html
import math
import pathlib

from matplotlib.figure import Figure

from mim_jax import config as configs
from mim_jax.evals.base import Eval, Headline, caption, drawn
from mim_jax.evals.report import Number, Report, plain, png, save_arrays
from mim_jax.run import files, loading, notes, rundir
from mim_jax.run.loading import Loaded
from mim_jax.run.log import read_rows
from mim_jax.schema import to_json

_PAGE = pathlib.Path(__file__).parent / "compare.html"
_BETTER = {
    "higher": "higher is better",
    "lower": "lower is better",
    "neither": "no direction is better",
}


def run(config: configs.Tree, workdir: files.Place) -> None:
    """Measure all of `config.runs` and write workdir/report/index.html.

    Every evaluation brings its own description, headline numbers and figures; the page
    has nothing else to say about it.

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
            sections.append(_section(name, evaluation, reports, figures, reasons))
        curves = _curves(trained)
        files.write(folder / "curves.png", png(curves))
        page = _PAGE.read_text()
        for mark, text in {
            "TITLE": ", ".join(html.escape(one.run.name) for one in runs.values()),
            "TABLE": _table(runs, settings.evaluations, results),
            "SECTIONS": "\n".join(sections),
            "CURVES": _picture("training loss", curves),
            "CONFIGS": _differences(trained),
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


def _table(
    runs: dict[str, Loaded],
    evaluations: dict[str, Eval],
    results: dict[str, dict[str, Report]],
) -> str:
    """The headline numbers that were measured, one row per run."""
    heads = ["<th>run</th>", "<th>method</th>"]
    rows = {
        title: [html.escape(title), type(one.run.objective).__name__]
        for title, one in runs.items()
    }
    for name, evaluation in evaluations.items():
        reports = results[name]
        # Keys of all runs, in the order of the first that has them.
        keys = dict.fromkeys(key for one in reports.values() for key in one.numbers)
        for headline in evaluation.headlines:
            for key, title in headline.columns(keys).items():
                better = f"<small>{_BETTER[headline.better]}</small>"
                heads.append(
                    f"<th>{html.escape(_full_title(headline, title))}{better}</th>"
                )
                for run, cells in rows.items():
                    numbers = reports[run].numbers if run in reports else {}
                    cells.append(_cell(numbers[key]) if key in numbers else "–")
    lines = ["<tr>", *heads, "</tr>"]
    for cells in rows.values():
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "\n".join(lines)


def _full_title(headline: Headline, title: str) -> str:
    """The title of a column, with the unit if that is not seen in the cells."""
    return title if headline.unit in ("share", "1") else f"{title}, {headline.unit}"


def _cell(number: Number) -> str:
    """A number with its interval; shares in percent."""

    def text(value: float) -> str:
        return f"{value:.1%}" if number.unit == "share" else f"{value:.3g}"

    if math.isnan(number.value):
        return "–"
    if number.interval is None:
        return text(number.value)
    low, high = map(text, number.interval)
    return f"{text(number.value)} <small>{low} to {high}</small>"


def _section(
    name: str,
    evaluation: Eval,
    reports: dict[str, Report],
    figures: dict[str, Figure],
    reasons: dict[str, str],
) -> str:
    """What an evaluation shows, its headline numbers explained, its figures, and why
    runs are missing."""
    title = html.escape(name.replace("_", " "))
    lines = [f"<h2 id={name!r}>{title}</h2>"]
    lines.append(f"<p>{html.escape(evaluation.description)}</p>")
    lines.append("<ul>")
    keys = [key for one in reports.values() for key in one.numbers]
    for headline in evaluation.headlines:
        word = _full_title(headline, headline.title.format("..."))
        text = f"{headline.meaning} {_BETTER[headline.better].capitalize()}."
        if not headline.columns(keys):
            text += " Not measured here."
        lines.append(f"<li><b>{html.escape(word)}</b>: {html.escape(text)}</li>")
    lines.append("</ul>")
    lines += [_picture(title, figure) for title, figure in figures.items()]
    lines += [
        f"<p class='note'>{html.escape(run)}: {html.escape(why)}</p>"
        for run, why in reasons.items()
    ]
    return "\n".join(lines)


def _picture(title: str, figure: Figure) -> str:
    """The figure as a tag that holds its PNG."""
    data = base64.b64encode(png(figure)).decode()
    return f"<img alt='{html.escape(title)}' src='data:image/png;base64,{data}'>"


def _curves(trained: dict[str, Loaded]) -> Figure:
    """Training loss of each run, on axes of its own: losses are not comparable."""
    figure = Figure(figsize=(3.2 * len(trained), 2.6), dpi=110)
    axes = figure.subplots(1, len(trained), squeeze=False)[0]
    for axis, (title, one) in zip(axes, trained.items(), strict=True):
        rows = read_rows(one.folder / "metrics.jsonl")
        rows = [row for row in rows if "loss" in row]  # others are of evaluations
        axis.plot([row["step"] for row in rows], [row["loss"] for row in rows])
        axis.set_title(plain(title), fontsize=8)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
    figure.tight_layout()
    return figure


def _differences(trained: dict[str, Loaded]) -> str:
    """The config leaves that differ between runs."""
    flat = [_flat(rundir.saved_config(one.folder) or {}) for one in trained.values()]
    names = sorted(set().union(*flat))
    lines = ["<tr><th>config</th>"]
    lines += [f"<th>{html.escape(title)}</th>" for title in trained]
    lines.append("</tr>")
    for name in names:
        values = [one.get(name, "–") for one in flat]
        if len({repr(value) for value in values}) > 1:
            cells = "".join(f"<td>{html.escape(str(value))}</td>" for value in values)
            lines.append(f"<tr><td>{html.escape(name)}</td>{cells}</tr>")
    return "\n".join(lines)


def _flat(tree: dict, above: str = "") -> dict[str, object]:
    """Leaves by dotted path."""
    found = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{above}{name}.")
        else:
            found[above + name] = value
    return found
