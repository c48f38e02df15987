# SPDX-License-Identifier: Apache-2.0
"""Numbers with their intervals, and the files that a report is written to."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure


class Number(NamedTuple):
    """A measured number.

    Attributes:
        value: may be NaN or infinite, but is never missing.
        unit: "dB", "share" (0..1), "1" for pure numbers, "images" for counts ...
        n: number of examples, if the value is a mean over examples, else None.
        interval: 95 % confidence interval of a mean over a sample.
    """

    value: float | int
    unit: str
    n: int | None = None
    interval: tuple[float, float] | None = None


def mean_of(values: Sequence | np.ndarray, unit: str) -> Number:
    """Mean of a sample, with its interval by Student's t.

    Example:
        >>> mean_of([1.0, 2.0, 3.0], "dB").value
        2.0
    """
    from scipy import stats  # slow to import: only when it is used

    values = np.asarray(values, np.float64)
    mean, n = float(values.mean()), len(values)
    interval = None
    if n > 1 and np.isfinite(values).all():
        half = float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / n**0.5)
        interval = (mean - half, mean + half)
    return Number(mean, unit, n, interval)


def share_of(right: Sequence | np.ndarray) -> Number:
    """Share of True values, with its interval by Wilson's score.

    Example:
        >>> share_of([True, True, False, True]).value
        0.75
    """
    from scipy import stats

    right = np.asarray(right, bool)
    found = stats.binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    interval = (float(found.low), float(found.high))
    return Number(float(right.mean()), "share", len(right), interval)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What an evaluation found about one run.

    Attributes:
        numbers: by name. The name ends with the unit where that is not a share.
        arrays: the values per example behind the numbers, and everything that the
            figures show. Numbers, booleans or strings; no Python objects.
    """

    numbers: dict[str, Number]
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def scalars(self) -> dict[str, float | int]:
        """The values alone, by name."""
        return {name: number.value for name, number in self.numbers.items()}

    @property
    def described(self) -> dict[str, dict]:
        """The numbers with unit, count and interval, in the form of results.json."""
        return {name: number._asdict() for name, number in self.numbers.items()}


def save(
    folder: pathlib.Path,
    name: str,
    found: dict[str, Report],
    figures: dict[str, Figure],
) -> None:
    """Write NAME.json, NAME.npz and a PNG per figure; print the numbers.

    With several runs NAME.json has one group per run.

    Args:
        folder: made if absent.
        found: the reports by the captions of their runs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = {run: report.scalars for run, report in found.items()}
    shown = next(iter(values.values())) if len(values) == 1 else values
    (folder / f"{name}.json").write_text(json.dumps(shown, indent=2) + "\n")
    save_arrays(folder, name, found)
    for title, figure in figures.items():
        figure.savefig(folder / f"{title}.png")
    for run, scalars in values.items():
        if len(values) > 1:
            print(run)
        for key, value in scalars.items():
            print(f"{key:32s} {value:.6g}")
    print(f"report in {folder}", flush=True)


def save_arrays(folder: pathlib.Path, name: str, found: dict[str, Report]) -> None:
    """Write NAME.npz, the arrays of the reports; no file if there are none.

    With one run the arrays have their own names; with several the caption of the run
    stands before them: "CAPTION/NAME". `numpy.load` reads the file; nothing in it is
    pickled.

    Raises:
        TypeError: an array holds Python objects.

    Example:
        >>> import tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> report = Report(numbers={}, arrays={"ratios": np.array([0.25, 0.5])})
        >>> save_arrays(folder, "cka", {"mae, step 100": report})
        >>> with np.load(folder / "cka.npz") as arrays:
        ...     arrays["ratios"].tolist()
        [0.25, 0.5]
    """
    arrays = {
        key if len(found) == 1 else f"{run}/{key}": np.asarray(array)
        for run, report in found.items()
        for key, array in report.arrays.items()
    }
    for key, array in arrays.items():
        if array.dtype.hasobject:
            raise TypeError(
                f"array {key!r} of the report of {name!r} holds Python objects: want "
                "numbers, booleans or strings of numpy"
            )
    if arrays:
        np.savez_compressed(folder / f"{name}.npz", allow_pickle=False, **arrays)
