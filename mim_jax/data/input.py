# SPDX-License-Identifier: Apache-2.0
"""Everything that config.data sets: a source, its examples and how they are read."""

import dataclasses
import os
from collections.abc import Iterable

import numpy as np

from mim_jax.data.examples import Crops, Examples
from mim_jax.data.examples.base import RESERVED, common_fields
from mim_jax.data.fields import check_declared
from mim_jax.data.geometry import Geometry
from mim_jax.schema import check_ranges, free, returned, within


@dataclasses.dataclass(frozen=True, kw_only=True)
class Input(Geometry):
    """Where examples come from, and how they are made and read ahead.

    Batches in memory at once: about workers x (2 x prefetch + 1) of this host, in
    shared memory (/dev/shm), or prefetch + 1 without workers.

    Example:
        >>> from mim_jax.data.sources.digits import Digits
        >>> data = Input(source=Digits(), image_size=(8, 8), crops=2)
        >>> {name: shape for name, (shape, _) in data.shapes.items()}
        {'image': (8, 8, 1), 'label': (), 'image2': (8, 8, 1)}
    """

    examples: Examples = Crops()  # turns a record into a training example
    # Processes that read, at most one for each core; 0: threads of this process. None:
    # one for each core but two, at most 8.
    workers: int | None = free(within(None, least=0, most=1024))
    # That read one batch together, in each process.
    threads: int = free(within(4, least=1, most=1024))
    # Batches held ready, per process.
    prefetch: int = free(within(2, least=1, most=1024))
    # Largest share of unreadable images; above it, stop.
    max_replaced: float = free(within(0.01, least=0, most=1))

    def __post_init__(self):
        check_ranges(self)
        channels = self.source.channels
        if not isinstance(channels, int | np.integer) or channels < 1:
            raise ValueError(
                f"{type(self.source).__name__}.channels is {returned(channels)}: want "
                "an int of at least 1"
            )
        super().__post_init__()
        self._check_fields()

    def _check_fields(self) -> None:
        """ValueError if the examples' declared fields break a rule of `Examples`."""
        author = type(self.examples).__name__
        for method in ("fields", "eval_fields"):
            fields = getattr(self.examples, method)(self)
            check_declared(fields, f"{author}.{method}")
            if taken := fields.keys() & set(RESERVED):
                raise ValueError(
                    f"{author}.{method} declares {sorted(taken)}, names that every "
                    "batch has already; want other names"
                )
            for name, want in common_fields(self).items():
                got = fields[name] if name in fields else None
                if got != want:
                    got = "nothing" if got is None else f"{got} (fill {got.fill})"
                    raise ValueError(
                        f"{author}.{method} declares {got} as {name!r}; want {want} "
                        f"(fill {want.fill}), which the trainer and evaluations read"
                    )

    @property
    def processes(self) -> int:
        """How many processes read on this machine; 0: threads of this process."""
        if hasattr(os, "sched_getaffinity"):  # those that this process may use
            cores = len(os.sched_getaffinity(0))
        else:
            cores = os.cpu_count() or 1
        if self.workers is None:
            return max(0, min(cores - 2, 8))
        return min(self.workers, cores)

    @property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
        """Shape and type of one row of each field that a training step may read."""
        fields = self.examples.fields(self)
        return {name: (field.shape, field.dtype) for name, field in fields.items()}

    def check_offers(self, names: Iterable[str], reader: str) -> None:
        """Refuses a reader of fields that training examples do not have.

        Args:
            names: the fields that are read.
            reader: who reads them, such as "MoCoV3", for the message.
        Raises:
            ValueError: a field is missing; the message says what to set.
        """
        offered = self.shapes
        for name in names:
            if name in offered:
                continue
            examples = type(self.examples).__name__
            advice = self.examples.advice(name) or (
                "a source that declares it, or config.data.examples that make it"
            )
            raise ValueError(
                f"data has no {name!r}, which {reader} reads; want {advice}. Source "
                f"{type(self.source).__name__} and examples {examples} offer: "
                f"{', '.join(sorted(offered))}"
            )
