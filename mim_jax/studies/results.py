# SPDX-License-Identifier: Apache-2.0
"""What the cells of a study say: means, spreads, paired differences, claims."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from mim_jax.evals.base import Eval
from mim_jax.studies.cells import Cell, Cells, Finished
from mim_jax.studies.grid import Claim, Column, Difference, Measure, Row, Study

HOLDS, FAILS = "holds", "does not hold"
UNKNOWN = "cannot be told at this scale"
MISSING = "not measured"
_LEVEL = 0.95


class Estimate(NamedTuple):
    """A mean over seeds.

    Attributes:
        mean: of the values.
        deviation: their standard deviation, with divisor n - 1; None of one value.
        n: number of values.
        interval: 95 % confidence interval of the mean by Student's t; None of one
            value.
    """

    mean: float
    deviation: float | None
    n: int
    interval: tuple[float, float] | None


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, deviation and interval of some values, at least one.

    Example:
        >>> one = estimate([1.0, 2.0, 3.0])
        >>> one.mean, one.deviation, [round(end, 3) for end in one.interval]
        (2.0, 1.0, [-0.484, 4.484])
    """
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Estimate(mean, None, n, None)
    deviation = float(np.std(values, ddof=1))
    half = float(special.stdtrit(n - 1, (1 + _LEVEL) / 2)) * deviation / math.sqrt(n)
    return Estimate(mean, deviation, n, (mean - half, mean + half))


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row's number in a column.

    Attributes:
        values: by seed.
        missing: why there is no value, or not one for each seed; "" if there is.
        paper: the paper's number; None if it prints none.
        uncertain: what is uncertain of the paper's number; "" if nothing is.
    """

    values: dict[int, float]
    missing: str
    paper: float | None
    uncertain: str = ""

    @property
    def estimate(self) -> Estimate | None:
        """None without a value."""
        return estimate(list(self.values.values())) if self.values else None


@dataclasses.dataclass(frozen=True)
class Compared:
    """A comparison, answered.

    Attributes:
        difference: of the first row's values and the second's, seed by seed; None
            without a seed that both have.
        answer: `HOLDS`, `FAILS`, `UNKNOWN` or `MISSING`.
    """

    asked: Difference
    difference: Estimate | None
    answer: str


@dataclasses.dataclass(frozen=True)
class Results:
    """All that the page of a study shows.

    Attributes:
        study: the declaration.
        cells: the cells of all studies.
        finished: the files of this study's cells that are there, by key.
        failed: why cells could not be made in this call, by key.
        entries: by row and column.
    """

    study: Study
    cells: Cells
    finished: Mapping[str, Finished]
    failed: Mapping[str, str]
    entries: Mapping[tuple[str, str], Entry]

    @property
    def columns(self) -> list[Column]:
        """The columns at the size of these results."""
        return self.study.columns_at(self.cells.size)

    def compared(self, asked: Difference) -> Compared:
        """The answer to a comparison."""
        first = self.entries.get((asked.first, asked.column))
        second = self.entries.get((asked.second, asked.column))
        pairs = []
        if first and second:
            common = sorted(first.values.keys() & second.values.keys())
            pairs = [first.values[seed] - second.values[seed] for seed in common]
        found = estimate(pairs) if pairs else None
        return Compared(asked, found, answer(found, asked.within))

    def answered(self, claim: Claim) -> tuple[str, list[Compared]]:
        """Whether a claim holds, and its comparisons."""
        found = [self.compared(one) for one in claim.compares]
        return verdict([one.answer for one in found]), found

    def row_cells(self, row: Row) -> dict[str, list[Cell]]:
        """The cells of a row, by its runs, one for each seed."""
        return {
            word: [self.cells.of(training, seed) for seed in self.cells.seeds]
            for word, training in row.runs.items()
        }

    def own_cells(self) -> list[Cell]:
        """The cells of this study that can be made."""
        return [one for one in self.cells.of_study(self.study) if not one.undefined]

    def hidden_share(self, row: Row) -> float | None:
        """The share of patches that the row's pre-training hides; None without."""
        for cells in self.row_cells(row).values():
            for cell in (one for found in cells for one in found.line):
                if cell.hidden_share is not None:
                    return cell.hidden_share
        return None

    @property
    def saved(self) -> dict[str, Any]:
        """As JSON values, for results.json."""
        rows = []
        for row in self.study.rows:
            numbers = {}
            for column in self.columns:
                entry = self.entries[row.name, column.title]
                found = entry.estimate
                numbers[column.title] = {
                    **(found._asdict() if found else {}),
                    "values": {str(seed): x for seed, x in entry.values.items()},
                    "missing": entry.missing,
                    "paper": entry.paper,
                    "paper_uncertain": entry.uncertain,
                }
            names = {
                word: [cell.name for cell in found]
                for word, found in self.row_cells(row).items()
            }
            share = self.hidden_share(row)
            rows.append(
                dict(row=row.name, hidden_share=share, cells=names, numbers=numbers)
            )
        claims = []
        for claim in self.study.claims:
            told, found = self.answered(claim)
            compared = [
                {
                    **dataclasses.asdict(one.asked),
                    "difference": one.difference and one.difference._asdict(),
                    "answer": one.answer,
                }
                for one in found
            ]
            claims.append(dict(claim=claim.text, where=claim.where, answer=told))
            claims[-1]["compares"] = compared
        own = self.own_cells()
        done = sum(cell.key in self.finished for cell in own)
        return {
            "study": self.study.name,
            "title": self.study.title,
            "paper": self.study.paper,
            "size": self.cells.size,
            "seeds": list(self.cells.seeds),
            "cells": {"finished": done, "wanted": len(own)},
            "rows": rows,
            "claims": claims,
        }


def answer(difference: Estimate | None, within: float | None) -> str:
    """What the interval of a paired difference tells.

    Args:
        difference: first minus second.
        within: None asks whether it is positive; a number, whether its size is less.

    Example:
        >>> answer(estimate([1.0, 1.1, 0.9]), None)
        'holds'
        >>> answer(estimate([1.0, 1.1, 0.9]), within=0.5)
        'does not hold'
    """
    if difference is None:
        return MISSING
    if difference.interval is None:
        return UNKNOWN
    low, high = difference.interval
    if within is None:
        holds, fails = low > 0, high < 0
    else:
        holds = -within < low and high < within
        fails = low > within or high < -within
    return HOLDS if holds else FAILS if fails else UNKNOWN


def verdict(answers: Sequence[str]) -> str:
    """Whether a claim holds, given the answers to its comparisons: it holds if all do,
    and it does not if one does not."""
    if not answers:
        return UNKNOWN
    if FAILS in answers:
        return FAILS
    if MISSING in answers:
        return MISSING
    return HOLDS if set(answers) == {HOLDS} else UNKNOWN


def gather(
    study: Study,
    cells: Cells,
    finished: Mapping[str, Finished],
    failed: Mapping[str, str],
    evals: Mapping[str, type[Eval]],
) -> Results:
    """The results of a study, from the files of its cells.

    Args:
        finished: by key of the cell.
        failed: why a cell could not be made, by key.
        evals: the evaluations that this version has.
    """
    entries = {}
    for row in study.rows:
        for column in study.columns_at(cells.size):
            entries[row.name, column.title] = _entry(
                study, row, column, cells, finished, failed, evals
            )
    return Results(study, cells, finished, failed, entries)


def _entry(study, row, column, cells, finished, failed, evals) -> Entry:
    fact = study.fact(row, column)
    paper = None if fact is None else fact.value
    marks = ("UNCERTAIN", "inferred", "presumed", "contradicts")
    parts = "" if fact is None else f"{fact.setting};{fact.metric}"
    uncertain = [part for part in parts.split(";") if any(m in part for m in marks)]
    values: dict[int, float] = {}
    reasons: list[str] = [row.missing] if row.missing else []
    if not row.missing and column.run not in row.runs:
        reasons = ["the row has no such run"]
    elif not row.missing:
        measure = row.measured(column.measure)
        for seed in cells.seeds:
            cell = cells.of(row.runs[column.run], seed)
            if cell.given and values:
                continue  # one run, which all seeds share, is one value
            found = _value(cell, column, measure, finished, failed, evals, cells.size)
            if isinstance(found, str):
                reasons.append(found)
            else:
                values[seed] = found
    return Entry(values, "; ".join(dict.fromkeys(reasons)), paper, "; ".join(uncertain))


def _value(
    cell: Cell, column: Column, measure: Measure, finished, failed, evals, size: str
) -> float | str:
    """The number of a cell in a column, or why there is none."""
    name = measure.name
    if cell.undefined:
        return f"not defined: {cell.undefined}"
    if measure.eval not in evals:
        return f"this version has no evaluation {measure.eval!r}"
    if cell.key in failed:
        return f"failed: {failed[cell.key]}"
    if cell.key not in finished:
        return "not run yet"
    measured = finished[cell.key].measured
    if name not in measured:
        return (
            f"{name} was not measured with these settings; the study's command does it "
            "where the run directory is there, else remove the cell's file"
        )
    if measured[name].missing:
        return measured[name].missing
    numbers = {key: n.value for key, n in measured[name].numbers.items()}
    found = column.value(numbers, size)
    if found is None:
        return f"{name} does not give {', '.join(column.keys_at(size))} for such a run"
    return found
