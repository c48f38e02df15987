# SPDX-License-Identifier: Apache-2.0
"""Everything that config.data sets: a source, its examples and how they are read."""

import dataclasses
from collections.abc import Iterable

import numpy as np

from mim_jax.data.examples import Crops, Examples
from mim_jax.data.examples.base import RESERVED, common_fields
from mim_jax.data.geometry import Geometry
from mim_jax.schema import free


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
    workers: int = free(8)  # processes that read; 0: threads of this process
    threads: int = free(4)  # that read one batch together, in each process
    prefetch: int = free(2)  # batches held ready, per process
    max_replaced: float = 0.01  # largest share of undecodable images; above, stop

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("workers", 0), ("threads", 1), ("prefetch", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name}={getattr(self, name)}: want {name} >= {least}"
                )
        if not 0 <= self.max_replaced <= 1:
            raise ValueError(f"max_replaced={self.max_replaced}: want 0 <= it <= 1")
        self._check_fields()

    def _check_fields(self) -> None:
        """ValueError if the examples' declared fields break a rule of `Examples`."""
        author = type(self.examples).__name__
        for method in ("fields", "eval_fields"):
            fields = getattr(self.examples, method)(self)
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
