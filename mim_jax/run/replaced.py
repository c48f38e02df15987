# SPDX-License-Identifier: Apache-2.0
"""The records that a run cannot read: counted, named, and in the end too many."""

import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from mim_jax.data.fields import DataError
from mim_jax.data.input import Input
from mim_jax.data.pipeline import why_unreadable
from mim_jax.run import files, hosts
from mim_jax.run.log import MetricsError

_NAMED = 8  # records that one process names on the screen, at most


class Replaced:
    """Counts the images of a run that stand in for records which cannot be read.

    Each such record is named once in `unreadable-hostN.txt` of the run directory, and
    the first ones on the screen, with the reason.

    Args:
        workdir: directory of the run.
        data: what it reads.
        extra: what `saved` returned for the checkpoint; {} for a new run.
    """

    def __init__(self, workdir: files.Place, data: Input, extra: dict[str, Any]):
        self._data = data
        self._path = workdir / f"unreadable-host{jax.process_index()}.txt"
        first_host = jax.process_index() == 0
        self._here = extra.get("replaced", 0) if first_host else 0
        # Replaced and seen images when the run gave up last: it counts from there.
        self._since: list[int] = extra.get("gave_up", [0, 0])
        self._known: set[int] = set()
        self._told: list[str] = []

    def note(self, indices: np.ndarray, replaced: np.ndarray) -> None:
        """Take the rows of a batch into account.

        Args:
            indices: the record that each row asks for.
            replaced: True where another one is shown.
        Raises:
            MetricsError: the file with the names cannot be written.
        """
        self._here += int(replaced.sum())
        for index in indices[replaced].tolist():
            self._name(index)

    def total(self) -> int:
        """Images replaced since the run began, on all hosts. All hosts must call this
        at the same point."""
        return sum(hosts.from_hosts(self._here, "the number of replaced images"))

    def check(self, total: int, seen: int) -> DataError | None:
        """Why the run should give up, or None.

        It should if more than `data.max_replaced` of the images seen were replaced, or
        of one epoch if that is more: one bad image at the start stops nothing. A run
        that gave up and was started again counts from there.

        Args:
            total: what `total` returned.
            seen: images read since the run began, on all hosts.
        """
        before, start = self._since
        count, limit = total - before, self._data.max_replaced
        images = max(seen - start, len(self._data.source))
        if count <= limit * images:
            return None
        self._since = [total, seen]
        named = "; ".join(self._told) or "none by this host"
        error = DataError(
            f"{count} of {images} images ({count / images:.2%}) could not be read, "
            f"more than config.data.max_replaced={limit:.2%}: {named}. All names are "
            f"in {self._path.with_name('unreadable-host*.txt')}. Put sound files in "
            "their places, or raise config.data.max_replaced: the same command then "
            "goes on"
        )
        error.everywhere = True
        return error

    def saved(self) -> dict[str, Any]:
        """JSON values to save with the checkpoint, as for `total`."""
        return {"replaced": self.total(), "gave_up": self._since}

    def _name(self, index: int) -> None:
        """Write the name of a record down, unless that has been done."""
        if index in self._known:
            return
        name = self._data.source.name_of(index)
        try:
            with files.append(self._path) as file:
                if not self._known:  # nor by an earlier process
                    file.seek(0)
                    self._known = set(_numbers(file.read()))
                if index not in self._known:
                    file.write(f"{index}\t{name}\n".encode(errors="replace"))
        except OSError as error:
            raise MetricsError(f"{self._path} could not be written: {error}") from error
        self._known.add(index)
        if len(self._told) < _NAMED:
            why = why_unreadable(self._data, index) or "it can be read again"
            self._told.append(f"{name} ({why})")
            print(
                f"WARNING: another image replaces {self._told[-1]}",
                file=sys.stderr,
                flush=True,
            )


def _numbers(text: bytes) -> Iterator[int]:
    """The records that lines name."""
    for line in text.splitlines():
        number = line.split(b"\t")[0]
        if number.isdigit() and len(number) < 20:  # Python converts no endless ones
            yield int(number)
