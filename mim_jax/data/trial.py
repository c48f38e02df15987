# SPDX-License-Identifier: Apache-2.0
"""One record of each split, tried before anything compiles.

Sources and examples may come from outside the package. A mistake in one shows here, on
one line, instead of in a worker process after minutes of compilation.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from mim_jax.data.decoding import Undecodable
from mim_jax.data.fields import ExampleError, check_example
from mim_jax.data.input import Input
from mim_jax.data.pipeline import asked, candidates, made, record_of
from mim_jax.data.sources.base import Source
from mim_jax.schema import brief, returned

_RECORD = "want a dict with 'image' and 'label'"


def check_first(data: Input, index: int = 0) -> None:
    """Makes an example of one record of the training source and one of the held-out
    source, and refuses a source or examples that do not keep a promise.

    A record that cannot be read is no mistake: another one is tried. But if none of
    these can be read either, the source is refused.

    Args:
        index: of the record; counted on from the first where a source has fewer.
    Raises:
        ExampleError: the message names class and method, what came and what is wanted.
    """
    try:
        source, name = data.source, type(data.source).__name__
        mark = _check_source(source)
        held_out = asked(f"{name}.held_out", source.held_out)
        if not isinstance(held_out, Source):
            raise ExampleError(
                f"{name}.held_out returned {returned(held_out)}: want a Source, the "
                "evaluation split of the same data"
            )
        if _check_source(held_out) == mark:
            raise ExampleError(
                f"{name}.held_out returned a source whose fingerprint is that of the "
                f"training split, {returned(mark)}: want other images, and a "
                "fingerprint that tells them apart, as by the name of the split"
            )
        _try(data, "train", index, np.random.default_rng(0))
        _try(dataclasses.replace(data, source=held_out), "evaluate", index)
    except OSError as error:
        raise ExampleError(f"data.source: {' '.join(str(error).split())}") from error


def _check_source(source: Source) -> dict[str, Any]:
    """The fingerprint of a source that says of itself what it should."""
    name = type(source).__name__
    count = asked(f"{name}.__len__", source.__len__)
    if not isinstance(count, int) or count < 1:
        raise ExampleError(
            f"{name}.__len__ returned {returned(count)}: want an int of at least 1"
        )
    classes = asked(f"{name}.classes", lambda: source.classes)
    if not isinstance(classes, tuple) or not all(isinstance(c, str) for c in classes):
        raise ExampleError(
            f"{name}.classes is {returned(classes)}: want a tuple of names, () if the "
            "records have no labels"
        )
    mark = asked(f"{name}.fingerprint", source.fingerprint)
    try:
        # A resumed run compares it with what it reads from JSON.
        plain = json.loads(json.dumps(mark, allow_nan=False)) == mark
    except (TypeError, ValueError):
        plain = False
    if not isinstance(mark, dict) or not plain:
        raise ExampleError(
            f"{name}.fingerprint returned {returned(mark)}: want a dict of plain JSON "
            "values: str, int, bool, lists instead of tuples, and no arrays"
        )
    return mark


def _try(data: Input, method: str, index: int, *more: Any) -> None:
    """Makes one example, checked."""
    source, examples = data.source, data.examples
    declare = examples.fields if method == "train" else examples.eval_fields
    name, tried = type(source).__name__, []
    for candidate in candidates(index % len(source), len(source)):
        try:
            record = record_of(source, candidate)
            _check_record(record, source, f"{name}[{candidate}]")
            made(data, declare(data), method, record, *more)
            return
        except Undecodable as error:
            tried.append(f"{source.name_of(candidate)} ({error})")
    split = "training" if method == "train" else "held-out"
    raise ExampleError(
        f"{name}: none of {len(tried)} {split} records that were tried can be read, "
        f"such as {tried[0]}: want a split whose records are sound images"
    )


def _check_record(record: Any, source: Source, author: str) -> None:
    if not isinstance(record, Mapping):
        raise ExampleError(f"{author} returned {returned(record)}: {_RECORD}")
    declared = source.fields()
    missing = [key for key in ("image", "label", *declared) if key not in record]
    if missing:
        raise ExampleError(
            f"{author} returned a record without {missing[0]!r}: it has "
            f"{', '.join(map(repr, record))}"
            + ("" if missing[0] in declared else f"; {_RECORD}")
        )
    image, label = record["image"], record["label"]
    if isinstance(image, np.ndarray):
        got = f"{image.dtype}{list(image.shape)}"
        sound = image.dtype == np.uint8 and image.ndim == 3
    else:
        got, sound = brief(image), isinstance(image, bytes)
    if not sound:
        raise ExampleError(
            f"{author} returned 'image' as {got}: want a uint8 array of rows, columns "
            "and channels, or an encoded image as bytes"
        )
    if not isinstance(label, int | np.integer):
        raise ExampleError(
            f"{author} returned 'label' as {brief(label)}: want an int, the "
            "position in `classes`, -1 if unknown"
        )
    check_example({key: record[key] for key in declared}, declared, author)
