# SPDX-License-Identifier: Apache-2.0
"""What every data source offers."""

import abc
import dataclasses
from concurrent import futures
from typing import Any

import numpy as np
from jaxtyping import Bool

from mim_jax.data.fields import Fields

_AT_A_TIME, _TOGETHER = 32, 64  # threads that read labels, and records of a turn


class Source(abc.ABC):
    """Random-access records, each with an image. A concrete one is a final frozen
    dataclass.

    Its fields are its config. It checks at construction that the data are there, and
    opens them at the first read, so that each worker process opens its own.
    """

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of records, at least 1."""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> dict[str, Any]:
        """Record `index`; asking twice gives the same.

        Returns:
            `image`: uint8 array of rows, columns, channels, or an encoded image as
            bytes. `label`: position in `classes`, -1 if unknown. What `fields`
            declares. Anything else that a plug-in of the kind `Examples` reads.
        """

    @property
    @abc.abstractmethod
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their labels; () if unlabelled."""

    @property
    def object_classes(self) -> tuple[str, ...]:
        """Names of the classes of the objects in the images, where records have these
        (`mim_jax.data.segments`); () without."""
        return ()

    @property
    @abc.abstractmethod
    def channels(self) -> int:
        """Channels of a decoded image."""

    @abc.abstractmethod
    def held_out(self) -> "Source":
        """The evaluation split of the same data."""

    @abc.abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for a run to be resumed: plain JSON values, no paths."""

    @property
    def note(self) -> str:
        """What a person should know about the choice of these records; "" is
        nothing."""
        return ""

    def fields(self) -> Fields:
        """Arrays of a fixed shape that every record has besides `image` and `label`,
        such as `latents` or `attributes`. They go into the batches as they are."""
        return {}

    def known(self, hidden: Bool[np.ndarray, "b n"]) -> dict[str, float]:
        """What theory says of predicting hidden patches of the first b records.

        Args:
            hidden: True at hidden patches, row by row.
        Returns:
            Numbers by name, such as "error_optimum", a mean squared error of pixels in
            0..1; {} where nothing is known.
        """
        del hidden
        return {}

    def labels(self) -> np.ndarray:
        """Label of every record, int32. This reads each record once, several at a
        time, since a bucket answers late; a source that knows its labels overrides it
        with something faster."""

        def some(start: int) -> list[int]:
            stop = min(start + _TOGETHER, len(self))
            return [self[index]["label"] for index in range(start, stop)]

        with futures.ThreadPoolExecutor(_AT_A_TIME) as pool:
            found = pool.map(some, range(0, len(self), _TOGETHER))
            return np.array([label for one in found for label in one], np.int32)

    def keep(self) -> None:
        """Write what a later start then need not find again. Only a training run calls
        this: nothing else of a source writes, since the config of somebody else's run
        may name any path."""
        return None

    def name_of(self, index: int) -> str:
        """What messages call record `index`, such as the path of its file."""
        return f"{type(self).__name__}[{index}]"

    def chosen(self) -> tuple[int, ...] | None:
        """Positions of these records in a larger source; None if there is none."""
        return None

    def __getstate__(self) -> dict[str, Any]:
        # Only fields travel to a worker; open files and caches do not.
        fields = dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
        return {field.name: getattr(self, field.name) for field in fields}


def check_split(split: str) -> None:
    """ValueError for a `split` other than the two that our own sources have."""
    if split not in ("train", "held_out"):
        raise ValueError(f"split={split!r} is unknown; known: held_out, train")
