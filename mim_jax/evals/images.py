# SPDX-License-Identifier: Apache-2.0
"""Images of a pass: which rows to read, by which keys, which pixels are hidden."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jaxtyping import Array, Bool, Int, Key

from mim_jax.evals.base import Batch
from mim_jax.ops.masking import Mask
from mim_jax.ops.patches import Grid, unpatchify

_SILENCE = 30  # seconds, at most, between lines of progress
# Fields of a batch that say where a row comes from, not what the example is.
_ORIGIN = ("index", "valid", "replaced")


def valid_images(
    batches: Iterable[Batch], what: str, most: int | None = None
) -> Iterator[tuple[Batch, Int[np.ndarray, " r"]]]:
    """The batches of a pass, each with the positions of its valid rows.

    Batches come whole, padding included, so that programs compiled for their shape fit
    all of them. The pass ends once `most` valid rows were given. A progress bar counts
    the images on a terminal.

    Args:
        what: the evaluation's name, for the progress bar and the error.
        most: rows to give at most; None gives all.
    Raises:
        ValueError: the pass has no valid row.

    Example:
        >>> first = {"label": np.arange(4), "valid": np.array([1, 0, 1, 1], bool)}
        >>> for batch, rows in valid_images([first], "example", most=2):
        ...     batch["label"][rows].tolist()
        [0, 2]
    """
    seen = 0
    for batch in watched(batches, what, most):
        rows = np.flatnonzero(batch["valid"])
        rows = rows if most is None else rows[: most - seen]
        if len(rows):
            yield batch, rows
        seen += len(rows)
        if seen == most:
            return
    if not seen:
        raise ValueError(
            f"{what}: the split has no images that can be read; want at least one"
        )


def watched(
    batches: Iterable[Batch], what: str, most: int | None = None
) -> Iterator[Batch]:
    """The batches of a pass, unchanged, with a progress bar that counts their images.

    The bar is written to stderr if that is a terminal, and removed after the pass. Else
    a pass that takes long prints a line every 30 seconds.

    Args:
        what: the caption of the bar.
        most: the caller leaves the pass after that many images.
    """
    # Ask before taking the first batch: the length of `Batches` is what is left.
    count = len(batches) or None if isinstance(batches, Sized) else None
    told, done, total = time.monotonic(), 0, most
    with tqdm.tqdm(
        desc=what, unit=" images", leave=False, disable=None, dynamic_ncols=True
    ) as bar:
        for batch in batches:
            rows = len(batch["valid"])
            if count is not None and bar.total is None:
                total = count * rows if most is None else min(count * rows, most)
                bar.reset(total)
            yield batch
            bar.update(rows)
            done += rows
            if bar.disable and time.monotonic() - told > _SILENCE:
                told = time.monotonic()
                of = "" if total is None else f" of {total}"
                print(f"{what}: {done}{of} images", file=sys.stderr, flush=True)


def example_fields(batch: Batch) -> Batch:
    """What objectives and maskings may read: the batch without the fields that say
    where its rows come from, and without fields that JAX cannot hold, such as text."""
    return {
        name: value
        for name, value in batch.items()
        if name not in _ORIGIN and np.asarray(value).dtype.kind in "biuf"
    }


def keys_of(batch: Batch, seed: int, number: int = 0) -> Key[Array, " b"]:
    """A random key for each image, which does not depend on the batch it comes in.

    Args:
        seed: of the evaluation.
        number: of the draw, if an image gets several.

    Example:
        >>> keys_of({"index": np.array([3, 8])}, seed=0).shape
        (2,)
    """
    base = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), number)
    indices = jnp.asarray(batch["index"], jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(base, indices)


def hidden_pixels(mask: Mask, grid: Grid) -> Bool[Array, "b h w"]:
    """True at the pixels of hidden patches.

    Example:
        >>> from mim_jax.ops.masking import from_hidden
        >>> mask = from_hidden(np.array([[True, False]]))
        >>> hidden_pixels(mask, Grid(rows=1, cols=2, patch=2))[0, 0].tolist()
        [True, True, False, False]
    """
    per_pixel = jnp.repeat(mask.hidden[:, :, None], grid.patch**2, axis=2)
    return unpatchify(per_pixel, grid)[..., 0]
