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

from mim_jax.data.decoding import Undecodable
from mim_jax.data.fields import Example, Fields, FieldSpec, check_example
from mim_jax.data.input import Input
from mim_jax.data.sources.base import Source
from mim_jax.data.workers import ENDLESS, Batches, read_ahead

_SUBSTITUTES = 20  # tried before a run gives up on a record
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
        record could not be decoded and a substitute is shown.
    Raises:
        ValueError: a number out of range.

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
    examples = (
        grain.MapDataset.range(len(data.source))
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(functools.partial(_train_example, data, fields))
    )
    read: Any = examples.__getitem__
    return read_ahead(read, fields | _TRAIN_ROW, positions, range(start, stop), data)


def eval_batches(
    data: Input,
    *,
    batch_size: int,
    host: int = 0,
    hosts: int = 1,
    source: Source | None = None,
) -> Batches:
    """This host's rows of one pass over a source, in order, each record once.

    Args:
        batch_size: of the GLOBAL batch, over all hosts.
        host, hosts: which part of each batch, of how many; all hosts get the same
            number of batches.
        source: what to read; None: the held-out split of the training source.
    Returns:
        Iterator of batches as in training, without randomness: the evaluation fields
        of `data.examples`, `index`, `replaced`, and `valid` bool (b,). `valid` is False
        on the rows that fill the last batch (fill values, label and index -1) and on
        records that cannot be decoded (fill values, their index and label, `replaced`
        True).
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
    data = dataclasses.replace(data, source=source)
    fields = data.examples.eval_fields(data)
    steps = range(-(-len(source) // batch_size))
    read = functools.partial(eval_example, data, fields)
    return read_ahead(read, fields | EVAL_ROW, positions, steps, data)


def eval_example(data: Input, fields: Fields, position: int) -> Example:
    """One row of `eval_batches`: the record of `data.source` at a position, or fill
    values beyond the last record.

    Args:
        fields: the evaluation fields of `data.examples`.
    """
    if position >= len(data.source):
        return filled_row(fields | EVAL_ROW)
    record = data.source[position]
    try:
        example = data.examples.evaluate(record, data)
        check_example(example, fields, _author(data, "evaluate"))
        valid = True
    except Undecodable:
        # No substitute: that record would count twice.
        example = filled_row(fields) | {"label": np.int32(record["label"])}
        valid = False
    row = {"replaced": np.bool_(not valid), "valid": np.bool_(valid)}
    return {**example, "index": np.int32(position), **row}


def filled_row(fields: Fields) -> Example:
    """A row that shows no record."""
    return {name: field.filled() for name, field in fields.items()}


def check_replaced(replaced: int, seen: int, limit: float) -> None:
    """Stops a run that replaced too many of the images it has read.

    Raises:
        RuntimeError: replaced / seen > limit.
    """
    if replaced > limit * seen:
        raise RuntimeError(
            f"{replaced} of {seen} images ({replaced / seen:.2%}) could not be decoded,"
            f" more than data.max_replaced={limit:.2%}: check the data set, or raise"
            " config.data.max_replaced"
        )


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


def _chosen(batch_size: int, places: tuple[int, ...], step: int) -> list[int]:
    return [step * batch_size + place for place in places]


def _train_example(
    data: Input, fields: Fields, index: int, rng: np.random.Generator
) -> Example:
    """The example of record `index`, or of its first substitute that is sound."""
    tried = []
    for candidate in _candidates(index, len(data.source)):
        record = data.source[candidate]
        try:
            example = data.examples.train(record, data, rng)
        except Undecodable as error:
            tried.append(f"{candidate} ({error})")
            continue
        check_example(example, fields, _author(data, "train"))
        replaced = np.bool_(bool(tried))
        return {**example, "index": np.int32(index), "replaced": replaced}
    raise RuntimeError(
        f"record {index} and its {_SUBSTITUTES} substitutes cannot be decoded; check"
        f" the data set: {'; '.join(tried)}"
    )


def _candidates(index: int, count: int) -> Iterator[int]:
    yield index
    # Drawn from the index alone: the same substitutes in every epoch and every run.
    rng = np.random.default_rng(index)
    yield from rng.integers(count, size=_SUBSTITUTES).tolist()


def _author(data: Input, method: str) -> str:
    examples, source = type(data.examples).__name__, type(data.source).__name__
    return f"{examples}.{method} for a record of {source}"
