# SPDX-License-Identifier: Apache-2.0
"""What a study is: runs, what is measured on them, and what is claimed of the numbers.

A `Training` says what is trained, by a file of configs/ and the leaves that differ. It
has one cell for each seed. Two studies that name the same training share its cells.
"""

import dataclasses
import fnmatch
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

from mim_jax.schema import unknown
from mim_jax.studies.facts import Fact, find

Leaves = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Patches:
    """A leaf's value: so many times the side of a ViT patch, in pixels."""

    count: int


@dataclasses.dataclass(frozen=True)
class Times:
    """A leaf's value: so many times the recipe's, rounded to a whole number if the
    recipe's is one."""

    factor: float


@dataclasses.dataclass(frozen=True)
class Shifts:
    """A setting's value: the names of the sets that differ from the training data."""


def _none() -> Leaves:
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """A run to train, once with each seed.

    Attributes:
        recipe: FILE of configs/FILE.py.
        leaves: leaves of its config that differ at every size; their values may be
            `Patches` or `Times`.
        full, small: further ones, at the paper's size and at embedded sizes.
        choices: plug-ins, as in the variant of a config: "masking=none".
        variant: of the recipe, at the paper's size.
        few: fields of the source `few`, which then chooses images from the recipe's
            source; its seed is the run's. None: all images.
        few_small: the same at embedded sizes; None: as `few`.
        parent: the run whose parameters this one begins with.
        given: a run directory that stands for the run, which is then not trained.
        called: its name in file names; "" makes one of recipe and leaves.
    """

    recipe: str
    leaves: Leaves = dataclasses.field(default_factory=_none)
    full: Leaves = dataclasses.field(default_factory=_none)
    small: Leaves = dataclasses.field(default_factory=_none)
    choices: str = ""
    variant: str = ""
    few: Leaves | None = None
    few_small: Leaves | None = None
    parent: "Training | None" = None
    given: str = ""
    called: str = ""

    def leaves_at(self, size: str) -> dict[str, Any]:
        """The leaves that differ at a size, the later ones deciding."""
        return {**self.leaves, **(self.full if size == "full" else self.small)}

    def few_at(self, size: str) -> Leaves | None:
        """The fields of the source `few` at a size; None if all images are read."""
        if size == "full" or self.few_small is None:
            return self.few
        return self.few_small

    def but(self, **changes: Any) -> "Training":
        """A copy; the groups of leaves are merged, not replaced."""
        for name in ("leaves", "full", "small"):
            if name in changes:
                changes[name] = {**getattr(self, name), **changes[name]}
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure:
    """An evaluation with its settings, and what of its report a cell keeps.

    Attributes:
        name: unlike that of other measures.
        eval: name of the evaluation in `mim_jax.evals.EVALS`. If this version has none
            of that name, the number is shown as missing.
        settings: of its fields that differ; a value may be `Shifts`.
        full: further ones at the paper's size.
        keep: arrays of the report that figures need.
        weights: of the trained model, or "initial": of the model before training.
    """

    name: str
    eval: str
    settings: Leaves = dataclasses.field(default_factory=_none)
    full: Leaves = dataclasses.field(default_factory=_none)
    keep: tuple[str, ...] = ()
    weights: Literal["trained", "initial"] = "trained"

    def settings_at(self, size: str) -> dict[str, Any]:
        """The settings that differ at a size."""
        return {**self.settings, **(self.full if size == "full" else {})}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """A number of every row.

    Attributes:
        title: unlike that of the study's other columns.
        run: the run of a row that is measured, a key of `Row.runs`.
        measure: how.
        keys: of the measured numbers; "*" stands for any letters. Several are averaged.
        full: those at the paper's size; (): the same.
        scale: what the numbers are multiplied by: 100 makes percent of a share.
        metric: the paper's, as in paper_tables.csv; "" if the paper has none.
        sizes: sizes that have the column; () is all.
        digits: after the decimal point.
        note: what a reader has to know of the number.
    """

    title: str
    run: str
    measure: Measure
    keys: tuple[str, ...]
    full: tuple[str, ...] = ()
    scale: float = 100.0
    metric: str = ""
    sizes: tuple[str, ...] = ()
    digits: int = 1
    note: str = ""

    def keys_at(self, size: str) -> tuple[str, ...]:
        """The keys at a size."""
        return self.full if size == "full" and self.full else self.keys

    def value(self, numbers: Mapping[str, float | int], size: str = "") -> float | None:
        """The number of a run of a study's size, given all that was measured; None if
        one is missing.

        Example:
            >>> knn = Measure(name="knn", eval="knn")
            >>> one = Column(title="10-NN", run="pretrain", measure=knn, keys=("a*",))
            >>> one.value({"accuracy": 0.5, "images": 9})
            50.0
        """
        found = []
        for key in self.keys_at(size):
            names = fnmatch.filter(numbers, key)
            if not names:
                return None
            found += [numbers[name] for name in names]
        return self.scale * sum(found) / len(found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table, or a point or picture of a figure.

    Attributes:
        name: unlike that of the study's other rows.
        runs: the trainings that columns measure, by the word that columns use:
            "pretrain", "finetune", "10pct", "probe".
        paper: the row's name in paper_tables.csv; "" if the paper has none.
        setting: a part of its setting there, where the name is ambiguous.
        at: place in figures, such as {"ratio": 0.5, "unit": 2}.
        weights: "initial" measures the models before training.
        missing: why this row cannot be trained; "" if it can.
        note: what a reader has to know of the row.
    """

    name: str
    runs: Mapping[str, Training] = dataclasses.field(default_factory=dict)
    paper: str = ""
    setting: str = ""
    at: Mapping[str, float | int] = dataclasses.field(default_factory=dict)
    weights: Literal["trained", "initial"] = "trained"
    missing: str = ""
    note: str = ""

    def measured(self, measure: Measure) -> Measure:
        """The measure as this row takes it."""
        if self.weights == "trained":
            return measure
        name = f"{measure.name}_untrained"
        return dataclasses.replace(measure, name=name, weights=self.weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """A comparison of two rows in one column, paired by seed.

    Attributes:
        first, second: names of rows.
        column: title of a column.
        within: None asks whether the first has more than the second; a number asks
            whether they differ by less than that, in the unit of the column.
    """

    first: str
    second: str
    column: str
    within: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence of the paper, and the comparisons that it says hold.

    Attributes:
        text: what is claimed, in one sentence.
        where: in the paper.
        compares: comparisons that must all hold; () if numbers cannot decide.
    """

    text: str
    where: str
    compares: tuple[Difference, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lines:
    """A figure of columns over a number of the rows, one line for each other number.

    Attributes:
        x: key of `Row.at` along the axis.
        columns: titles; each has axes of its own.
        by: key of `Row.at` that tells the lines apart; "" draws one line.
    """

    x: str
    columns: tuple[str, ...]
    by: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """The figure that an evaluation draws itself, of the first seed of each row.

    Attributes:
        run: the run of a row, a key of `Row.runs`.
        measure: whose figures are drawn; it keeps the arrays that they need.
        names: of its figures, those to show; () is all.
    """

    run: str
    measure: Measure
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A table or figure of a paper.

    Attributes:
        name: of its config file, configs/study_NAME.py.
        title: of its page.
        paper: arXiv number.
        table: number of the table in paper_tables.csv; "" if the paper prints none.
        small: the embedded size at which it is usually run.
        full: whether it runs at the paper's size, too; False: at `small` alone.
        columns, rows, claims, figures: of its page.
        notes: what a reader has to know of all its numbers.
    """

    name: str
    title: str
    paper: str
    table: str = ""
    small: str = "mnist"
    full: bool = True
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...] = ()
    figures: tuple[Lines | Drawn, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        for what, names in (
            ("row", [row.name for row in self.rows]),
            ("column", [column.title for column in self.columns]),
        ):
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise ValueError(
                    f"study {self.name}: {what} {min(twice)!r} stands twice: want each "
                    "name once"
                )
        rows = {row.name for row in self.rows}
        columns = {column.title for column in self.columns}
        for one in (one for claim in self.claims for one in claim.compares):
            for name, known in (
                (one.first, rows),
                (one.second, rows),
                (one.column, columns),
            ):
                if name not in known:
                    raise ValueError(
                        f"study {self.name}: a claim compares {name!r}: want one of "
                        f"{sorted(known)}"
                    )
        runs = {word for row in self.rows for word in row.runs}
        nothing = all(row.missing for row in self.rows)
        for word in [column.run for column in self.columns]:
            if word not in runs and not nothing:
                raise ValueError(
                    f"study {self.name}: a column measures run {word!r}, and no row "
                    f"has one; there are {sorted(runs)}"
                )

    def columns_at(self, size: str) -> list[Column]:
        """The columns of the table at a size."""
        return [one for one in self.columns if not one.sizes or size in one.sizes]

    def fact(self, row: Row, column: Column) -> Fact | None:
        """The paper's number of a row and column; None if it prints none.

        Raises:
            LookupError: the row or column names a number that is not there, or several.
        """
        if not (self.table and row.paper and column.metric):
            return None
        where = (self.paper, self.table, row.paper, row.setting)
        return find(*where, column.metric)

    def measures(self) -> list[tuple[Training, Measure]]:
        """What has to be measured on which run."""
        asked = [(one.run, one.measure) for one in self.columns]
        drawn = [one for one in self.figures if isinstance(one, Drawn)]
        asked += [(one.run, one.measure) for one in drawn]
        return [
            (row.runs[word], row.measured(measure))
            for row in self.rows
            for word, measure in asked
            if word in row.runs
        ]


def with_given(study: Study, given: Mapping[str, str]) -> Study:
    """The study with run directories in place of runs that it would train.

    What a row trains from its run begins with the run directory instead. A row that
    names no runs has those of the first row that does.

    Args:
        given: run directories by the names of rows.
    Raises:
        ValueError: there is no such row, or nothing to put the directory in place of.
    """
    rows = {row.name: row for row in study.rows}
    for name, folder in given.items():
        if name not in rows:
            raise ValueError(unknown("row", name, rows))
        whole = [
            row.runs for row in (rows[name], *study.rows) if "pretrain" in row.runs
        ]
        if not whole:
            raise ValueError(f"row {name!r}: the study {study.name!r} has no such run")
        old = whole[0]["pretrain"]
        new = Training(recipe="", called=f"{name}-given", given=folder)
        runs = {
            word: new if one is old else dataclasses.replace(one, parent=new)
            for word, one in whole[0].items()
            if one is old or one.parent is old
        }
        note = f"measured on weights that were given: {pathlib.Path(folder).name}."
        note = f"{rows[name].note} {note}".strip()
        rows[name] = dataclasses.replace(rows[name], runs=runs, missing="", note=note)
    return dataclasses.replace(study, rows=tuple(rows.values()))
