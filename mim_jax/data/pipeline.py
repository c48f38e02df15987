# SPDX-License-Identifier: Apache-2.0
"""From a source to the batches of one host: endless for training, one pass for
evaluation.

Example i of a run is a pure function of (seed, i). Step t reads examples t * batch to
(t + 1) * batch - 1, and each host its own rows of these. So the step number is the
whole state of the data, and the number of hosts, workers and threads changes no byte.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from mim_jax.data.decoding import Undecodable
from mim_jax.data.fields import (
    DataError,
    Example,
    ExampleError,
    Fields,
    FieldSpec,
    check_example,
)
from mim_jax.data.input import Input
from mim_jax.data.sources.base import Source
from mim_jax.data.workers import ENDLESS, Batches, read_ahead
from mim_jax.schema import raised

_SUBSTITUTES = 20  # tried before a run gives up on a record
_FEW = 1000  # at most so many records get a permutation
_NAMED = 5  # of the records that cannot be read, in the message of a run that gives up
# What every batch has besides the fields of its examples.
_TRAIN_ROW = {
    "index": FieldSpec((), np.int32, fill=-1),
    "replaced": FieldSpec((), np.bool_),
}
EVAL_ROW = _TRAIN_ROW | {"valid": FieldSpec((), np.bool_)}


def train_batches(
    data: Input,
    *,
    seed: int,
    batch_size: int,
    start: int = 0,
    stop: int | None = None,
    host: int = 0,
    hosts: int = 1,
    places: Sequence[int] | None = None,
) -> Batches:
    """This host's rows of the training batches of steps `start`, `start + 1`, ...

    Records come in a new random order in every epoch, each once an epoch; a batch may
    span two epochs.

    Args:
        seed: of the order, the crops and the flips; 0 <= seed < 2**32.
        batch_size: of the GLOBAL batch, over all hosts.
        start, stop: first step, and the step before which to end (None: never).
        host, hosts: which part of each batch, of how many.
        places: instead, the rows of each batch that this host reads, in order.
    Returns:
        Iterator of batches; `b` = batch_size / hosts, everything a pure function of
        (seed, step, row). A batch has the fields of `data.examples`, such as `image`
        uint8 (b, h, w, c) and `label` int32 (b,), -1 if unknown. It also has `index`
        int32 (b,), the record asked for, and `replaced` bool (b,), True where that
        record could not be read and a substitute is shown.
    Raises:
        ValueError: a number out of range.
        DataError, from the iterator: a record and its substitutes cannot be read.

    Example:
        >>> from mim_jax.data.sources.digits import Digits
        >>> data = Input(source=Digits(), image_size=(8, 8), workers=0)
        >>> with train_batches(data, seed=0, batch_size=16, stop=3) as batches:
        ...     shapes = [batch["image"].shape for batch in batches]
        >>> shapes
        [(16, 8, 8, 1), (16, 8, 8, 1), (16, 8, 8, 1)]
    """
    positions = positions_of_host(batch_size, host, hosts)
    if places is not None:
        positions = functools.partial(_chosen, batch_size, tuple(places))
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed}: want 0 <= seed < 2**32")
    stop = ENDLESS if stop is None else stop
    if not 0 <= start <= stop:
        raise ValueError(f"start={start}, stop={stop}: want 0 <= start <= stop")
    fields = data.examples.fields(data)
    read: Any = (
        _order(len(data.source), seed)
        .random_map(functools.partial(_train_example, data, fields))
        .__getitem__
    )
    return read_ahead(read, fields | _TRAIN_ROW, positions, range(start, stop), data)


def identity(source: Source) -> dict[str, Any]:
    """What a checkpoint says of its data. A run that goes on wants the same, or it
    would read other examples.

    `order` marks the order of few records: Grain's own, before it was ours.
    """
    found = source.fingerprint()
    return found | {"order": "permutation"} if len(source) <= _FEW else found


def _order(count: int, seed: int) -> grain.MapDataset:
    """The record at each place of a run: a new order of all of them in every epoch.

    Grain finds the record at a place without the others, by drawing among 65,536
    numbers until one is below `count`: 3 ms a record for ten records. So few records
    get a permutation of ours.
    """
    if count > _FEW:
        return grain.MapDataset.range(count).seed(seed).shuffle().repeat()
    places = grain.MapDataset.range(ENDLESS).seed(seed)
    return places.map(functools.partial(_record_at, count, seed))


def _record_at(count: int, seed: int, place: int) -> int:
    epoch, there = divmod(place, count)
    return _permutation(count, seed, epoch)[there]


@functools.lru_cache(maxsize=64)  # a batch may span many epochs of few records
def _permutation(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    # Raw bits are the same in every version of NumPy; its shuffles are not.
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(count)
    return tuple(np.argsort(bits, kind="stable").tolist())


def eval_batches(
    data: Input,
    *,
    batch_size: int,
    host: int = 0,
    hosts: int = 1,
    source: Source | None = None,
    spread: bool = False,
) -> Batches:
    """This host's rows of one pass over a source, in order, each record once.

    Args:
        batch_size: of the GLOBAL batch, over all hosts.
        host, hosts: which part of each batch, of how many; all hosts get the same
            number of batches.
        source: what to read; None: the held-out split of the training source.
        spread: whether records that are sorted by class come in the order of
            `interleaved`, so that who reads a few of them sees all classes alike. Other
            records come in their own order, and so do those whose labels take a read
            of every record to know.
    Returns:
        Iterator of batches as in training, without randomness: the evaluation fields
        of `data.examples`, `index`, `replaced`, and `valid` bool (b,). `valid` is False
        on the rows that fill the last batch (fill values, label and index -1) and on
        records that cannot be read (fill values, their index, their label if that can
        be read, `replaced` True).
    Raises:
        ValueError: a number out of range.

    Example:
        >>> from mim_jax.data.sources.digits import Digits
        >>> data = Input(source=Digits(), image_size=(8, 8), workers=0)
        >>> with eval_batches(data, batch_size=64) as batches:
        ...     sum(int(batch["valid"].sum()) for batch in batches)
        355
    """
    positions = positions_of_host(batch_size, host, hosts)
    source = data.source.held_out() if source is None else source
    if spread and type(source).labels is not Source.labels:
        labels = source.labels()
        if (np.diff(labels) >= 0).all():
            positions = functools.partial(_reordered, positions, interleaved(labels))
    data = dataclasses.replace(data, source=source)
    fields = data.examples.eval_fields(data)
    steps = range(-(-len(source) // batch_size))
    read = functools.partial(eval_example, data, fields)
    return read_ahead(read, fields | EVAL_ROW, positions, steps, data)


def interleaved(labels: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Positions of records in an order whose every beginning has the classes alike: one
    record of each class, then a second of each, and so on.

    Classes that lie far apart come first, so that a beginning shorter than a round is
    spread too.

    Args:
        labels: one per record, in any order.

    Example:
        >>> interleaved(np.array([0, 0, 0, 1, 1, 2, 3])).tolist()
        [0, 5, 3, 6, 1, 4, 2]
    """
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    by_class = np.argsort(classes, kind="stable")
    rounds = np.empty_like(by_class)
    rounds[by_class] = np.concatenate([np.arange(count) for count in counts])
    bits = max(1, (len(counts) - 1).bit_length())
    turns = np.array([int(f"{i:0{bits}b}"[::-1], 2) for i in range(len(counts))])
    return np.lexsort((turns[classes], rounds))


def eval_example(data: Input, fields: Fields, position: int) -> Example:
    """One row of `eval_batches`: the record of `data.source` at a position, or fill
    values beyond the last record.

    Args:
        fields: the evaluation fields of `data.examples`.
    """
    row, record = filled_row(fields | EVAL_ROW), {}
    if position >= len(data.source):
        return row
    row["index"] = np.int32(position)
    try:
        record = record_of(data.source, position)
        example = made(data, fields, "evaluate", record)
    except Undecodable:
        # No substitute: that record would count twice.
        label = {"label": np.int32(record["label"])} if record else {}
        return row | label | {"replaced": np.bool_(True)}
    return row | example | {"valid": np.bool_(True)}


def record_of(source: Source, index: int) -> Any:
    """Record `index` of a source.

    Raises:
        Undecodable: the system cannot read it: a file is gone, a disk is broken.
        ExampleError: the source's own code fails; the message names class and record.
    """
    try:
        return asked(f"{type(source).__name__}[{index}]", source.__getitem__, index)
    except OSError as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise Undecodable(why) from error


def why_unreadable(data: Input, index: int) -> str:
    """Why no training example can be made of record `index`; "" if one can."""
    try:
        record = record_of(data.source, index)
        # Any crop will do: what cannot be read fails before it is cropped.
        rng = np.random.default_rng(0)
        made(data, data.examples.fields(data), "train", record, rng)
    except Undecodable as error:
        return " ".join(str(error).split())
    return ""


def made(data: Input, fields: Fields, method: str, record: Any, *more: Any) -> Example:
    """The example that `data.examples` make of a record, checked.

    Args:
        fields: those that it declares.
        method: "train" or "evaluate".
        more: further arguments of the method.
    Raises:
        Undecodable: the record is broken.
        ExampleError: the example is not as declared, or the plug-in's own code fails.
    """
    examples = data.examples
    author = (
        f"{type(examples).__name__}.{method} for a record of "
        f"{type(data.source).__name__}"
    )
    example = asked(author, getattr(examples, method), record, data, *more)
    check_example(example, fields, author)
    return example


def asked(author: str, function: Callable[..., Any], *given: Any) -> Any:
    """What a method of a plug-in returns.

    Args:
        author: class and method, for the message.
    Raises:
        ExampleError: its own code fails. Undecodable and errors of the system, such as
            a disk that cannot be read, pass as they are.
    """
    try:
        return function(*given)
    except (Undecodable, ExampleError, OSError):
        raise
    except Exception as error:
        raise ExampleError(f"{author} raised {raised(error)}") from error


def filled_row(fields: Fields) -> Example:
    """A row that shows no record."""
    return {name: field.filled() for name, field in fields.items()}


def positions_of_host(
    batch_size: int, host: int, hosts: int
) -> Callable[[int], Sequence[int]]:
    """The function from a step to the positions that this host reads for it.

    Raises:
        ValueError: there is no such host, or the batch cannot be divided.
    """
    if not 0 <= host < hosts:
        raise ValueError(f"host={host}: want 0 <= host < hosts={hosts}")
    if batch_size < 1 or batch_size % hosts:
        raise ValueError(
            f"batch_size={batch_size}: want a multiple of the {hosts} hosts, >= 1"
        )
    return functools.partial(_share, batch_size, batch_size // hosts, host)


def _share(batch_size: int, share: int, host: int, step: int) -> range:
    first = step * batch_size + host * share
    return range(first, first + share)


def _reordered(
    positions: Callable[[int], Sequence[int]], order: Int[np.ndarray, " n"], step: int
) -> list[int]:
    places = positions(step)
    return [int(order[place]) if place < len(order) else place for place in places]


def _chosen(batch_size: int, places: tuple[int, ...], step: int) -> list[int]:
    return [step * batch_size + place for place in places]


def _train_example(
    data: Input, fields: Fields, index: int, rng: np.random.Generator
) -> Example:
    """The example of record `index`, or of its first substitute that is sound."""
    tried = []
    for candidate in candidates(index, len(data.source)):
        try:
            record = record_of(data.source, candidate)
            example = made(data, fields, "train", record, rng)
        except Undecodable as error:
            tried.append(f"{data.source.name_of(candidate)} ({error})")
            continue
        replaced = np.bool_(bool(tried))
        return {**example, "index": np.int32(index), "replaced": replaced}
    more = f"; and {len(tried) - _NAMED} more" if len(tried) > _NAMED else ""
    raise DataError(
        f"{tried[0]} cannot be read, and none of {_SUBSTITUTES} records in its place: "
        f"{'; '.join(tried[1:_NAMED])}{more}. Check that the data are there"
    )


def candidates(index: int, count: int) -> Iterator[int]:
    """Record `index` of so many, then those that are tried in its place: the same in
    every epoch and every run."""
    yield index
    rng = np.random.default_rng(index)  # drawn from the index alone
    yield from rng.integers(count, size=_SUBSTITUTES).tolist()
