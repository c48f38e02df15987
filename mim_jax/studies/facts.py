# SPDX-License-Identifier: Apache-2.0
"""The numbers that the papers print, in paper_tables.csv.

P1 is arXiv:2208.04164, P2 is arXiv:2306.04898. A setting that is uncertain says so, in
words after "UNCERTAIN", "inferred" or "presumed".
"""

import csv
import functools
import pathlib
from typing import NamedTuple

P1, P2 = "2208.04164", "2306.04898"
_FILE = pathlib.Path(__file__).parent / "paper_tables.csv"


class Fact(NamedTuple):
    """A printed number.

    Attributes:
        paper: arXiv number.
        table: number of the table in the paper.
        row, setting, metric: what the number is of, as in paper_tables.csv.
        value: in the unit that `metric` names; a shape bias is a share.
    """

    paper: str
    table: str
    row: str
    setting: str
    metric: str
    value: float


@functools.cache
def facts() -> tuple[Fact, ...]:
    """All numbers, in the order of the file."""
    with _FILE.open(newline="") as lines:
        return tuple(
            Fact(**{**line, "value": float(line["value"])})  # type: ignore[arg-type]
            for line in csv.DictReader(lines)
        )


def find(paper: str, table: str, row: str, setting: str, metric: str) -> Fact | None:
    """The number of a row and metric; None where the table has a dash.

    Args:
        setting: one of the parts of the setting, between semicolons, where the row's
            name alone is ambiguous; else "". Words that follow it in the file, as the
            remark in brackets of a metric, need not be given.
    Raises:
        LookupError: the table has no such row or no such metric, or several numbers
            fit; names those that there are.

    Example:
        >>> find(P1, "4", "C-MAE", "", "Lin. Prob Acc (%)").value
        41.1
    """
    near = [one for one in facts() if (one.paper, one.table) == (paper, table)]
    own = [
        one
        for one in near
        if one.row == row
        and (not setting or any(_begins(it, setting) for it in one.setting.split(";")))
    ]
    found = [one for one in own if _begins(one.metric, metric)]
    where = f"table {table} of arXiv:{paper}"
    if not own:
        known = sorted({(one.row, one.setting) for one in near})
        raise LookupError(
            f"no row {row!r} with {setting!r} in {where}: want of {known}"
        )
    if not any(_begins(one.metric, metric) for one in near):
        known = sorted({one.metric for one in near})
        raise LookupError(f"no metric {metric!r} in {where}: want one of {known}")
    if len(found) > 1:
        raise LookupError(
            f"{len(found)} numbers of {row!r} and {metric!r} in {where}: want a part "
            f"of the setting that tells {[one.setting for one in found]} apart"
        )
    return found[0] if found else None


def _begins(text: str, words: str) -> bool:
    return text == words or text.startswith(f"{words} ")
