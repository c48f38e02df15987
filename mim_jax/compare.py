# SPDX-License-Identifier: Apache-2.0
"""Job "compare": several runs on one page that opens from disk."""

import base64
import collections
import dataclasses
import hashlib
import html
import inspect
import io
import math
import pathlib
import re
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from mim_jax import config as configs
from mim_jax.evals.base import Eval, Headline, caption, drawn
from mim_jax.evals.report import Number, Report, plain, png, save_arrays
from mim_jax.evals.side_by_side import Shown, picture, side_by_side
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
_BEST, _EQUAL = "★ best", "≈ best"
_GALLERY = "reconstruction"  # the evaluation that the gallery of images is part of
_LARGEST = 160  # pixels of a side in the gallery
_LINES = ("-", "--", "-.", ":")  # told apart without colour
_SPREAD = 10  # from this ratio of largest to smallest on, an axis is logarithmic


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
            sections.append(
                _section(name, evaluation, reports, figures, reasons, below)
            )
        curves = _curves(trained)
        if curves is not None:
            files.write(folder / "curves.png", png(curves))
        page = _PAGE.read_text()
        for mark, text in {
            "TITLE": ", ".join(html.escape(one.run.name) for one in runs.values()),
            "NAV": _contents(settings.evaluations),
            "TABLE": _table(runs, settings.evaluations, results),
            "SECTIONS": "\n".join(sections),
            "CURVES": _losses(trained, curves),
            "COMMANDS": _commands(trained),
            "CONFIGS": _differences(trained),
            "WORDS": _methods(runs),
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


def _table(
    runs: dict[str, Loaded],
    evaluations: dict[str, Eval],
    results: dict[str, dict[str, Report]],
) -> str:
    """The headline numbers that were measured, one row per run."""
    heads = [_head("run", "words"), _head("method", "words")]
    rows = {
        title: [
            f"<th scope='row'>{html.escape(title)}</th>",
            f"<td>{html.escape(type(one.run.objective).__name__)}</td>",
        ]
        for title, one in runs.items()
    }
    for name, evaluation in evaluations.items():
        reports = results[name]
        # Keys of all runs, in the order of the first that has them.
        keys = dict.fromkeys(key for one in reports.values() for key in one.numbers)
        for headline in evaluation.headlines:
            for key, title in headline.columns(keys).items():
                text, better = _full_title(headline, title), headline.better
                heads.append(_head(text, better, _BETTER[better]))
                numbers = {
                    run: report.numbers[key]
                    for run, report in reports.items()
                    if key in report.numbers
                }
                marks = _marks(better, numbers)
                for run, cells in rows.items():
                    cells.append(_cell(numbers.get(run), marks.get(run, "")))
    lines = ["<thead><tr>", *heads, "</tr></thead>", "<tbody>"]
    lines += ["<tr>" + "".join(cells) + "</tr>" for cells in rows.values()]
    return "\n".join([*lines, "</tbody>"])


def _head(title: str, better: str, below: str = "") -> str:
    """The head of a column that the page's script can sort."""
    small = f"<small>{html.escape(below)}</small>" if below else ""
    return (
        f"<th scope='col' data-better='{html.escape(better)}'>"
        f"{html.escape(title)}{small}</th>"
    )


def _full_title(headline: Headline, title: str) -> str:
    """The title of a column, with the unit if that is not seen in the cells."""
    return title if headline.unit in ("share", "1") else f"{title}, {headline.unit}"


def _marks(better: str, numbers: dict[str, Number]) -> dict[str, str]:
    """By run, whether its number is the best, or not told apart from the best.

    Example:
        >>> values = [(0.5, (0.4, 0.6)), (0.7, (0.6, 0.8)), (0.9, (0.7, 1.0))]
        >>> numbers = {v: Number(v, "share", 9, interval) for v, interval in values}
        >>> _marks("higher", numbers)
        {0.7: '≈ best', 0.9: '★ best'}
    """
    there = {run: one for run, one in numbers.items() if not math.isnan(one.value)}
    if better == "neither" or len(there) < 2:
        return {}
    pick = max if better == "higher" else min
    best = pick(there.values(), key=lambda one: one.value)
    return {
        run: _BEST if one.value == best.value else _EQUAL
        for run, one in there.items()
        if one.value == best.value or _overlap(one.interval, best.interval)
    }


def _overlap(
    one: tuple[float, float] | None, other: tuple[float, float] | None
) -> bool:
    return bool(one and other and one[0] <= other[1] and other[0] <= one[1])


def _cell(number: Number | None, mark: str = "") -> str:
    """A number with its interval; shares in percent."""
    if number is None or math.isnan(number.value):
        return "<td>–</td>"
    exact = repr(float(number.value)).replace("inf", "Infinity")  # as JavaScript has it
    parts = [_text(number.value, number.unit)]
    if number.interval is not None:
        low, high = (_text(end, number.unit) for end in number.interval)
        parts.append(f" <small>{low} to {high}</small>")
    if mark:
        parts.append(f"<b>{mark}</b>")
    best = " class='best'" if mark == _BEST else ""
    return f"<td{best} data-value='{exact}'>{''.join(parts)}</td>"


def _text(value: float, unit: str) -> str:
    return f"{value:.1%}" if unit == "share" else f"{value:.3g}"


def _section(
    name: str,
    evaluation: Eval,
    reports: dict[str, Report],
    figures: dict[str, Figure],
    reasons: dict[str, str],
    below: str = "",
) -> str:
    """What an evaluation shows, its headline numbers explained, its figures, and why
    runs are missing.

    Args:
        below: what else the section shows, as HTML.
    """
    title = html.escape(name.replace("_", " "))
    lines = [f"<h2 id='{html.escape(name)}'>{title}</h2>"]
    lines.append(f"<p>{html.escape(evaluation.description)}</p>")
    lines.append("<ul>")
    keys = [key for one in reports.values() for key in one.numbers]
    for headline in evaluation.headlines:
        word = _full_title(headline, headline.title.format("..."))
        text = f"{headline.meaning} {_BETTER[headline.better].capitalize()}."
        columns = headline.columns(keys)
        measured = (
            report.numbers[key].n
            for report in reports.values()
            for key in columns
            if key in report.numbers
        )
        sizes = {n for n in measured if n is not None}
        if not columns:
            text += " Not measured here."
        elif sizes:
            text += f" n = {', '.join(map(str, sorted(sizes)))}."
        lines.append(f"<li><b>{html.escape(word)}</b>: {html.escape(text)}</li>")
    lines.append("</ul>")
    lines += [_picture(title, figure) for title, figure in figures.items()]
    lines.append(below)
    lines += [
        f"<p class='note'>{html.escape(run)}: {html.escape(why)}</p>"
        for run, why in reasons.items()
    ]
    return "\n".join(lines)


def _picture(title: str, figure: Figure) -> str:
    """The figure as a tag that holds its PNG."""
    data = base64.b64encode(png(figure)).decode()
    alt = html.escape(_in_words(title, figure))
    return (
        "<div class='figure' tabindex='0' role='region' "
        f"aria-label='{html.escape(title)}'>"
        f"<img alt='{alt}' src='data:image/png;base64,{data}'></div>"
    )


def _in_words(name: str, figure: Figure) -> str:
    """What a figure says of itself: its title, and titles, labels and legends of its
    axes."""
    texts = [figure.get_suptitle()]
    for axis in figure.axes:
        texts += [axis.get_title(), axis.get_xlabel(), axis.get_ylabel()]
        if legend := axis.get_legend():
            texts += [text.get_text() for text in legend.get_texts()]
    words = [" ".join(text.replace(r"\$", "$").split()) for text in texts]
    said = "; ".join(dict.fromkeys(word for word in words if word))
    return f"{name}: {said}"[:600] if said else name


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
    return _gallery(shown, alike=len(maskings) == 1)


def _gallery(shown: Shown, alike: bool) -> str:
    """The same images through all models, as a table of images.

    Args:
        alike: whether all models hid patches in the same way in training.
    """
    mark = {run: " †" if run in shown.helped else "" for run in shown.filled}
    heads = ["image", "original", "visible"]
    heads += [run + mark[run] for run in shown.filled]
    lines = [
        "<h3>the same images through all models</h3>",
        "<p>A row is one held-out image. All models see the same visible patches, and "
        "fill in the grey ones. Below: PSNR of the hidden pixels in dB, higher is "
        f"better. The masks are drawn as {html.escape(shown.masked_as)} drew them in "
        "training.</p>",
    ]
    if not alike:
        lines.append(
            "<p><b>These models hid patches in different ways in training</b> (see "
            "objective.masking below), so some of them see here what they were not "
            "trained for; and the PSNR in the table above, which is each model's with "
            "masks of its own, does not compare them.</p>"
        )
    if shown.helped:
        lines.append(
            "<p>† predicts patches with mean and contrast removed, and was given the "
            "true ones of each hidden patch.</p>"
        )
    lines.append(
        "<div class='wide gallery' tabindex='0' role='region' aria-label='the same "
        "images through all models'><table><thead><tr>"
    )
    lines += [f"<th scope='col'>{html.escape(head)}</th>" for head in heads]
    lines.append("</tr></thead><tbody>")
    for i, label in enumerate(shown.classes):
        name = f"{label or 'image'} (no. {shown.records[i]})"
        cells = [
            _small(shown.original[i], f"{name}: original"),
            _small(shown.seen[i], f"{name}: the visible patches; hidden ones are grey"),
        ]
        for run, images in shown.filled.items():
            score = f"{shown.psnr[run][i]:.1f} dB"
            text = f"{name}, filled in by {run}: {score}"
            cells.append(f"{_small(images[i], text)}<small>{score}</small>")
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        small = f"<small>no. {shown.records[i]}</small>"
        head = f"<th scope='row'>{html.escape(label or 'image')}{small}</th>"
        lines.append(f"<tr>{head}{row}</tr>")
    lines.append("</tbody></table></div>")
    lines += [
        f"<p class='note'>Not here: {html.escape(run)}: {html.escape(why)}</p>"
        for run, why in shown.reasons.items()
    ]
    return "\n".join(lines)


def _small(image: np.ndarray, alt: str) -> str:
    """An image in 0..1 as a tag that holds its PNG."""
    pixels = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    made, file = Image.fromarray(pixels), io.BytesIO()
    if max(made.size) > _LARGEST:
        made.thumbnail((_LARGEST, _LARGEST))
    made.save(file, format="png", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    return f"<img alt='{html.escape(alt)}' src='data:image/png;base64,{data}'>"


def _curves(trained: dict[str, Loaded]) -> Figure | None:
    """Training losses, on the same axes where they are the same function; None if no
    run logged one."""
    groups: dict[tuple, dict[str, tuple[list, list]]] = {}
    styles = {}
    for number, (title, one) in enumerate(trained.items()):
        rows = read_rows(one.folder / "metrics.jsonl")
        # Rows without are of evaluations.
        rows = [row for row in rows if row.get("loss") is not None]
        if rows:
            line = [row["step"] for row in rows], [row["loss"] for row in rows]
            groups.setdefault(_loss_of(one), {})[title] = line
            styles[title] = {"color": f"C{number}", "ls": _LINES[number % 4]}
    if not groups:
        return None
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    size = (4.4 * columns, 3.4 * rows)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    cells = figure.subplots(rows, columns, squeeze=False).ravel()
    for cell in cells[len(groups) :]:
        cell.set_axis_off()
    shared = collections.Counter(key[0] for key in groups)
    for axis, (key, lines) in zip(cells, groups.items(), strict=False):
        for title, (steps, losses) in lines.items():
            dot = "." if len(steps) < 40 else ""
            axis.plot(steps, losses, marker=dot, label=plain(title), **styles[title])
        named = f"{key[0]}, settings of its own" if shared[key[0]] > 1 else key[0]
        axis.set_title(f"loss of {named}", fontsize=9)
        _scale(axis.set_yscale, [v for _, losses in lines.values() for v in losses])
        _scale(axis.set_xscale, [steps[-1] for steps, _ in lines.values()])
        axis.set_xlabel(f"updates of the parameters{_noted(axis.get_xscale())}")
        axis.set_ylabel(f"loss{_noted(axis.get_yscale())}")
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=7)
    return figure


def _scale(choose: Any, values: list[float]) -> None:
    """Make an axis logarithmic where its values lie far apart."""
    if min(values) > 0 and max(values) >= _SPREAD * min(values):
        choose("log")


def _noted(scale: str) -> str:
    return ", log scale" if scale == "log" else ""


def _loss_of(one: Loaded) -> tuple:
    """What has to be equal for two losses to be the same function: the method, and
    every setting of it but the sizes of its networks."""
    objective = one.training.objective
    values = {
        # A concrete objective is a dataclass.
        field.name: getattr(objective, field.name)
        for field in dataclasses.fields(objective)  # pyright: ignore[reportArgumentType]
        if field.name not in ("encoder", "decoder")
    }
    return type(objective).__name__, repr(values)


def _losses(trained: dict[str, Loaded], curves: Figure | None) -> str:
    """The curves, and which runs have none."""
    lines = [_picture("training loss", curves)] if curves is not None else []
    silent = [
        title
        for title, one in trained.items()
        if not any("loss" in row for row in read_rows(one.folder / "metrics.jsonl"))
    ]
    lines += [
        f"<p class='note'>{html.escape(title)}: no loss was logged in its directory, "
        "as in one that was made from a file of weights.</p>"
        for title in silent
    ]
    return "\n".join(lines)


def _commands(trained: dict[str, Loaded]) -> str:
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


def _methods(runs: dict[str, Loaded]) -> str:
    """The methods of the table, each in the first sentence of its own documentation."""
    kinds = dict.fromkeys(type(one.run.objective) for one in runs.values())
    lines = []
    for kind in kinds:
        words = (inspect.getdoc(kind) or "").partition("\n\n")[0]
        text = html.escape(" ".join(words.split()))
        lines.append(f"<dt>{html.escape(kind.__name__)}</dt><dd>{text}</dd>")
    return "\n".join(lines)


def _differences(trained: dict[str, Loaded]) -> str:
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
