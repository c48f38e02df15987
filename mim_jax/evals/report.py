# SPDX-License-Identifier: Apache-2.0
"""Numbers with their intervals, and the files that a report is written to."""

import dataclasses
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy import special  # unlike scipy.stats it takes no half second to import

from mim_jax.run import files
from mim_jax.schema import brief, to_json


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
    values = np.asarray(values, np.float64)
    mean, n = float(values.mean()), len(values)
    interval = None
    if n > 1 and np.isfinite(values).all():
        t = float(special.stdtrit(n - 1, 0.975))
        half = t * float(values.std(ddof=1)) / n**0.5
        interval = (mean - half, mean + half)
    return Number(mean, unit, n, interval)


def share_of(right: Sequence | np.ndarray) -> Number:
    """Share of True values, with its interval by Wilson's score.

    Example:
        >>> share_of([True, True, False, True]).value
        0.75
    """
    return mean_share(np.asarray(right, bool))


def mean_share(shares: Sequence | np.ndarray) -> Number:
    """Mean of shares 0..1, one per example, with Wilson's interval for as many examples
    that are right or wrong. Shares between 0 and 1 vary less than these, so the
    interval is not too narrow; and it does not shrink to a point where all are 1.

    Example:
        >>> mean_share([1.0, 0.5, 0.0, 0.5]).value
        0.5
    """
    n, value = len(shares), float(np.mean(shares))
    z = float(special.ndtri(0.975))
    middle = (value + z * z / (2 * n)) / (1 + z * z / n)
    variance = value * (1 - value) / n + z * z / (4 * n * n)
    half = z / (1 + z * z / n) * max(variance, 0.0) ** 0.5
    low, high = max(0.0, middle - half), min(middle + half, 1.0)
    return Number(value, "share", n, (min(low, value), max(high, value)))


class ReportError(ValueError):
    """A report holds something else than numbers and arrays."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What an evaluation found about one run.

    Attributes:
        numbers: by name. The name ends with the unit where that is not a share.
        arrays: the values per example behind the numbers, and everything that the
            figures show. Numbers, booleans or strings; no Python objects. Lists
            become arrays.
    Raises:
        ReportError: a number is no `Number`, or an array cannot be one.
    """

    numbers: dict[str, Number]
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for word, want in (("numbers", "Number(VALUE, UNIT)"), ("arrays", "arrays")):
            if not isinstance(getattr(self, word), dict):
                raise ReportError(
                    f"{word}={brief(getattr(self, word))}: want a dict of {want} by "
                    "name"
                )
        numbers = {key: _number(key, one) for key, one in self.numbers.items()}
        arrays = {key: _array(key, one) for key, one in self.arrays.items()}
        object.__setattr__(self, "numbers", numbers)
        object.__setattr__(self, "arrays", arrays)

    @property
    def scalars(self) -> dict[str, float | int]:
        """The values alone, by name."""
        return {name: number.value for name, number in self.numbers.items()}

    @property
    def described(self) -> dict[str, dict]:
        """The numbers with unit, count and interval, in the form of results.json."""
        return {name: number._asdict() for name, number in self.numbers.items()}


def _number(key: str, number: object) -> Number:
    """The number with a value that JSON can state; ReportError if it is none."""
    if isinstance(number, Number):
        value: Any = number.value
        if not isinstance(value, int | float) and np.shape(value) == ():
            value = np.asarray(value).item()  # a scalar of NumPy or JAX
        if isinstance(value, int | float):
            return number._replace(value=value)
    raise ReportError(
        f"numbers[{key!r}] is {brief(number)}: want Number(VALUE, UNIT) with an int "
        "or a float, or mean_of or share_of a sample"
    )


def _array(key: str, value: object) -> np.ndarray:
    """The value as an array; ReportError if it would hold Python objects."""
    try:
        array = np.asarray(value)
        if not array.dtype.hasobject:
            return array
    except ValueError:  # rows of different lengths
        pass
    raise ReportError(
        f"arrays[{key!r}] is {brief(value)}: want an array of numbers, booleans or "
        "strings"
    )


def save(
    folder: files.Place,
    name: str,
    found: dict[str, Report],
    figures: dict[str, Figure],
) -> None:
    """Write the files of `write`, and print the numbers."""
    write(folder, name, found, figures)
    for run, report in found.items():
        if len(found) > 1:
            print(run)
        for key, value in report.scalars.items():
            print(f"{key:32s} {value:.6g}")
    print(f"report in {folder}", flush=True)


def write(
    folder: files.Place,
    name: str,
    found: dict[str, Report],
    figures: dict[str, Figure],
) -> dict[str, files.Place]:
    """Write NAME.json, NAME.npz and a PNG per figure.

    With several runs NAME.json has one group per run. A number that is not finite is
    null there.

    Args:
        folder: made if absent, in a folder that exists.
        found: the reports by the captions of their runs.
    Returns:
        The PNG files, by the names of the figures.
    """
    files.make(folder)
    values = {run: report.scalars for run, report in found.items()}
    shown = next(iter(values.values())) if len(values) == 1 else values
    files.write(folder / f"{name}.json", to_json(shown, indent=2) + "\n")
    save_arrays(folder, name, found)
    pictures = {title: folder / f"{title}.png" for title in figures}
    for title, path in pictures.items():
        files.write(path, png(figures[title]))
    return pictures


def png(figure: Figure) -> bytes:
    """The picture of a figure, as the content of a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def plain(text: str) -> str:
    """The text as matplotlib has to be given it, to show it as it is: the names of runs
    and classes are anybody's, and between two "$" stands a formula.

    Example:
        >>> print(plain("$5 or $6"))
        \\$5 or \\$6
    """
    return text.replace("$", r"\$")


def save_arrays(folder: files.Place, name: str, found: dict[str, Report]) -> None:
    """Write NAME.npz, the arrays of the reports; no file if there are none.

    With one run the arrays have their own names; with several the caption of the run
    stands before them: "CAPTION/NAME". `numpy.load` reads the file; nothing in it is
    pickled.

    Raises:
        TypeError: an array holds Python objects.

    Example:
        >>> import pathlib, tempfile
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
        file = io.BytesIO()
        np.savez_compressed(file, allow_pickle=False, **arrays)
        files.write(folder / f"{name}.npz", file.getvalue())
