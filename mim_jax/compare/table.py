# SPDX-License-Identifier: Apache-2.0
"""The table of a comparison: a row per run, a column per headline number."""

import html
import math

from mim_jax.evals.base import Eval, Headline
from mim_jax.evals.report import Number, Report
from mim_jax.run.loading import Loaded

# What a page says of each direction of `Headline.better`.
BETTER = {
    "higher": "higher is better",
    "lower": "lower is better",
    "neither": "no direction is better",
}
_BEST, _EQUAL = "★ best", "≈ best"


def table(
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
                text, better = full_title(headline, title), headline.better
                heads.append(_head(text, better, BETTER[better]))
                numbers = {
                    run: report.numbers[key]
                    for run, report in reports.items()
                    if key in report.numbers
                }
                found = marks(better, numbers)
                for run, cells in rows.items():
                    cells.append(cell(numbers.get(run), found.get(run, "")))
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


def full_title(headline: Headline, title: str) -> str:
    """The title of a column, with the unit if that is not seen in the cells."""
    return title if headline.unit in ("share", "1") else f"{title}, {headline.unit}"


def marks(better: str, numbers: dict[str, Number]) -> dict[str, str]:
    """By run, whether its number is the best, or not told apart from the best.

    Example:
        >>> values = [(0.5, (0.4, 0.6)), (0.7, (0.6, 0.8)), (0.9, (0.7, 1.0))]
        >>> numbers = {v: Number(v, "share", 9, interval) for v, interval in values}
        >>> marks("higher", numbers)
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


def cell(number: Number | None, mark: str = "") -> str:
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
