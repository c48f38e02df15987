# SPDX-License-Identifier: Apache-2.0
"""The page of a study: a table, figures and claims, as Markdown that GitHub shows."""

import html
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np
from matplotlib.figure import Figure

from mim_jax.evals.base import Eval, drawn
from mim_jax.evals.report import Report, png
from mim_jax.run import files
from mim_jax.schema import to_json
from mim_jax.studies.cells import Finished
from mim_jax.studies.grid import Column, Difference, Drawn, Lines, Row, Study
from mim_jax.studies.results import MISSING, Entry, Estimate, Results

_MARK = "–"


def write(
    results: Results,
    folder: pathlib.Path,
    evals: Mapping[str, type[Eval]],
    command: str,
) -> pathlib.Path:
    """Write README.md, results.json and the figures of a study.

    Args:
        folder: of the page.
        evals: the evaluations that this version has.
        command: that makes what is missing.
    Returns:
        The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    files.write(folder / "results.json", to_json(results.saved, indent=1) + "\n")
    pictures: dict[str, str] = {}
    reasons: list[str] = []
    for name, figure, remark in _figures(results, evals, reasons):
        files.write(folder / f"{name}.png", png(figure))
        pictures[name] = remark
    page = folder / "README.md"
    files.write(page, "\n".join(_lines(results, pictures, reasons, command)) + "\n")
    return page


def _lines(
    results: Results, pictures: dict[str, str], reasons: list[str], command: str
) -> Iterator[str]:
    study, size = results.study, results.cells.size
    cells = results.own_cells()
    there = [cell for cell in cells if cell.key in results.finished]
    where = f"table {study.table} of " if study.table else ""
    yield f"# {study.title}"
    yield ""
    yield f"{where}[arXiv:{study.paper}](https://arxiv.org/abs/{study.paper})".strip()
    yield f"at size `{size}`: {len(there)} of {len(cells)} cells finished."
    missing = len(there) < len(cells)
    yield f"`{command}` makes {'what is missing' if missing else 'them'}."
    yield ""
    yield from _table(results)
    yield ""
    seeds = len(results.cells.seeds)
    others = "" if size == "full" else ", of another data set and a larger network"
    yield (
        f"Ours: mean ± standard deviation over seeds, n of {seeds} where it is less. "
        f"In brackets the paper's number{others}; "
        "? marks those that are uncertain. Hidden: the share of patches that is really "
        "hidden in pre-training."
    )
    yield ""
    for line in (
        *study.notes,
        *(f"{one.title}: {one.note}" for one in results.columns if one.note),
        *(f"{row.name}: {row.note}" for row in study.rows if row.note),
    ):
        yield f"* {line}"
    yield from _missing(results)
    if study.claims:
        yield ""
        yield "## Claims"
        yield ""
        yield from _claims(results)
    if pictures or reasons:
        yield ""
        yield "## Figures"
        for name, remark in pictures.items():
            yield ""
            yield f"![{study.title}: {name.replace('_', ' ')}]({name}.png)"
            if remark:
                yield ""
                yield remark
    for reason in reasons:
        yield ""
        yield _plain(reason)
    yield ""
    yield "## How it was made"
    yield ""
    yield from _made([results.finished[cell.key] for cell in there])


def _table(results: Results) -> Iterator[str]:
    shares = {row.name: results.hidden_share(row) for row in results.study.rows}
    some = any(share is not None for share in shares.values())
    heads = ["row", *(["hidden"] if some else [])]
    heads += [column.title for column in results.columns]
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    for row in results.study.rows:
        cells = [row.name]
        if some:
            share = shares[row.name]
            cells.append(_MARK if share is None else f"{share:.3g}")
        for column in results.columns:
            cells.append(_text(results, row, column))
        yield f"| {' | '.join(cells)} |"


def _text(results: Results, row: Row, column: Column) -> str:
    """A cell of the table."""
    entry = results.entries[row.name, column.title]
    found, places = entry.estimate, column.digits
    if found is None:
        text = "not defined" if "not defined" in entry.missing else _MARK
    else:
        text = f"{found.mean:.{places}f}"
        if found.deviation is not None:
            text += f" ± {found.deviation:.{places}f}"
        if found.n < len(results.cells.seeds):
            text += f", n = {found.n}"
    if entry.paper is not None:
        mark = "?" if entry.uncertain else ""
        text += f" ({entry.paper:g}{mark})"
    return text


def _missing(results: Results) -> Iterator[str]:
    """Why numbers are missing, each reason once."""
    reasons: dict[str, list[str]] = {}
    for (row, column), entry in results.entries.items():
        if entry.missing:
            reasons.setdefault(entry.missing, []).append(f"{row}, {column}")
    if not reasons:
        return
    yield ""
    yield "## What is missing"
    yield ""
    for reason, places in reasons.items():
        shown = "; ".join(places[:4])
        more = f" and {len(places) - 4} more" if len(places) > 4 else ""
        yield f"* {shown}{more}: {_plain(reason)}"


def _claims(results: Results) -> Iterator[str]:
    for claim in results.study.claims:
        told, found = results.answered(claim)
        yield f"* **{told.capitalize()}**: {claim.text} ({claim.where})"
        if not found:
            yield "    * no number decides it: see the figures"
        for one in found:
            told = comparison(results.study, one.asked, one.difference, one.answer)
            yield f"    * {told}"


def comparison(
    study: Study, asked: Difference, difference: Estimate | None, answer: str
) -> str:
    """A comparison of a study with its interval and its answer, in words."""
    places = next((c.digits for c in study.columns if c.title == asked.column), 2)
    wanted = "> 0" if asked.within is None else f"within ±{asked.within:g}"
    text = f"{asked.first} − {asked.second}, {asked.column}: "
    if difference is None:
        return text + MISSING
    text += f"{difference.mean:+.{places}f}"
    if difference.interval:
        low, high = difference.interval
        text += f", 95 % interval {low:+.{places}f} to {high:+.{places}f}"
    return f"{text}, n = {difference.n}; asked: {wanted}; {answer}"


def _made(found: list[Finished]) -> Iterator[str]:
    """Where and how long the cells were made."""
    if not found:
        yield "No cell is finished."
        return
    made = [one.file for one in found]
    minutes = sum(file["minutes"] for file in made)
    processors = sorted({f"{file['processor']}, {file['devices']}" for file in made})
    versions = sorted(
        {
            f"mim_jax {v['mim_jax']}, jax {v['jax']}"
            for v in (f["versions"] for f in made)
        }
    )
    where, by = _plain("; ".join(processors)), _plain("; ".join(versions))
    # The file of a resumed cell has the minutes since it was resumed.
    least = "at least " * any(file["resumed"] for file in made)
    yield (
        f"{len(made)} cell{'s' * (len(made) > 1)} in {least}{minutes:.0f} minutes of "
        f"{where}, "
        f"by {by}. Each has a file in `cells/`, with its whole config."
    )


def _plain(text: str) -> str:
    """A text from a file as one line of Markdown, without tags of HTML."""
    return html.escape(" ".join(text.split()), quote=False)


def _figures(
    results: Results, evals: Mapping[str, type[Eval]], reasons: list[str]
) -> Iterator[tuple[str, Figure, str]]:
    """The figures of a study, each with its name and a remark to stand below it, or "".

    Why one could not be drawn goes to `reasons`.
    """
    numbered = [one for one in results.columns if _any_value(results, one)]
    if numbered:
        yield "table", _dots(results, numbered), ""
    for number, declared in enumerate(results.study.figures, 1):
        if isinstance(declared, Lines):
            figure = _curves(results, declared)
            if figure is not None:
                yield f"lines{number}", figure, ""
        else:
            try:
                figures = _drawn(results, declared, evals)
            except Exception as error:  # an evaluation's own; the numbers are there
                name, kind = declared.measure.name, type(error).__name__
                reasons.append(f"The figure of {name} was not drawn: {kind}: {error}")
                continue
            remark = f"Seed {results.cells.seeds[0]} of each row."
            for name, figure in figures.items():
                yield name, figure, remark


def _any_value(results: Results, column: Column) -> bool:
    return any(results.entries[r.name, column.title].values for r in results.study.rows)


def _dots(results: Results, columns: list[Column]) -> Figure:
    """Every value as a dot and every mean as a line, one panel for each column."""
    rows = results.study.rows
    size = (2.2 + 2.4 * len(columns), 0.9 + 0.28 * len(rows))
    figure = Figure(figsize=size, dpi=110)
    axes = figure.subplots(1, len(columns), squeeze=False, sharey=True)[0]
    for axis, column in zip(axes, columns, strict=True):
        for place, row in enumerate(rows):
            entry = results.entries[row.name, column.title]
            if entry.values:
                values = list(entry.values.values())
                axis.plot(
                    values, [place] * len(values), "o", ms=4, color="C0", alpha=0.6
                )
                axis.plot([np.mean(values)], [place], "|", ms=14, color="C0", mew=2)
        axis.set_title(column.title, fontsize=8)
        axis.grid(axis="x", lw=0.4)
        axis.tick_params(labelsize=7)
    axes[0].set_yticks(range(len(rows)), [row.name for row in rows], fontsize=7)
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.tight_layout()
    return figure


def _curves(results: Results, declared: Lines) -> Figure | None:
    """Columns over a number of the rows; None without a value."""
    columns = [c for c in results.columns if c.title in declared.columns]
    lines: dict[tuple[str, float], dict[float, Entry]] = {}
    for column in columns:
        for row in results.study.rows:
            entry = results.entries[row.name, column.title]
            if not entry.values or declared.x not in row.at:
                continue
            by = row.at[declared.by] if declared.by else 0.0
            lines.setdefault((column.title, by), {})[row.at[declared.x]] = entry
    if not lines:
        return None
    figure = Figure(figsize=(3.0 * len(columns), 2.9), dpi=110)
    axes = figure.subplots(1, len(columns), squeeze=False)[0]
    for axis, column in zip(axes, columns, strict=True):
        own = sorted((by, line) for (t, by), line in lines.items() if t == column.title)
        for by, line in own:
            places = sorted(line)
            found = [line[x].estimate for x in places]
            means = [one.mean for one in found if one]
            spread = [one.deviation or 0 for one in found if one]
            label = f"{declared.by} {by:g}" if declared.by else None
            axis.errorbar(
                places, means, spread, marker="o", ms=4, capsize=2, label=label
            )
        axis.set_title(column.title, fontsize=8)
        axis.set_xlabel(declared.x, fontsize=8)
        axis.tick_params(labelsize=7)
        if declared.by and own:
            axis.legend(fontsize=7)
    figure.tight_layout()
    return figure


def _drawn(
    results: Results, declared: Drawn, evals: Mapping[str, type[Eval]]
) -> dict[str, Figure]:
    """The evaluation's own figures, of the first seed of each row."""
    if declared.measure.eval not in evals:
        return {}
    reports: dict[str, Report] = {}
    for row in results.study.rows:
        if declared.run not in row.runs:
            continue
        cell = results.cells.of(row.runs[declared.run], results.cells.seeds[0])
        name = row.measured(declared.measure).name
        if cell.key in results.finished:
            measured = results.finished[cell.key].measured
            if name in measured and not measured[name].missing:
                reports[row.name] = measured[name].report
    if not reports:
        return {}
    settings = declared.measure.settings_at(results.cells.size)
    figures = drawn(evals[declared.measure.eval](**settings), reports)
    names = declared.names or figures
    return {name: figures[name] for name in names}
