# SPDX-License-Identifier: Apache-2.0
"""Digests: how a checkpoint shows that it is what was saved.

Orbax restores a flipped bit without a word. So each checkpoint has a JSON record beside
its arrays: type, shape and digest of every leaf, and a digest of the record itself.
"""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp

from mim_jax.sharding import path_name

_NAMED = 8  # leaves that a message names, at most


class DamageError(Exception):
    """This checkpoint is not what was saved."""


def leaf_digests(tree: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A digest of every leaf, and whether all numbers of every float leaf are finite.

    The digest has 32 bits and is the same for any sharding: the words of a leaf are
    weighted by odd numbers that depend on their place, and summed modulo 2**32. That
    sum is exact in any order, and every single flipped bit changes it.

    Returns:
        ({name: uint32}, {name: bool}), names as `params/encoder/norm/bias`.
    """
    digests, finite = {}, {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path_name(path)
        # A program for each shape compiles sooner than one with all leaves. Each is
        # waited for: CPU devices deadlock in the sums of many programs at once.
        found = jax.block_until_ready(_digest_and_finite(leaf))
        digests[name] = found[0]
        if found[1] is not None:
            finite[name] = found[1]
    return digests, finite


def leaf_types(tree: Any) -> dict[str, list]:
    """[type, shape] of every leaf by its name, in the form that JSON gives back."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): _type_of(leaf) for path, leaf in leaves}


def check_leaves(tree: Any, stored: dict[str, list]) -> None:
    """Compare restored leaves with their [type, shape, digest] in the record.

    Raises:
        DamageError: naming the leaves that are not the bytes that were saved.
    """
    leaves = {
        path_name(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    # For a leaf that Orbax does not find, it returns the shape that it was asked for.
    bad = [
        name
        for name, leaf in leaves.items()
        if not isinstance(leaf, jax.Array) or stored[name][:2] != _type_of(leaf)
    ]
    if not bad:
        digests, _ = jax.device_get(leaf_digests(tree))
        bad = [name for name, value in digests.items() if stored[name][2] != int(value)]
    if bad:
        raise DamageError(f"{name_some(bad)}: not the bytes that were saved")


def differences(stored: dict[str, list], wanted: dict[str, list]) -> list[str]:
    """Lines "name: saved type -> wanted type" of the leaves that are not the same.

    Args:
        stored: [type, shape, digest] by name, from a checkpoint's record.
        wanted: [type, shape] by name, as `leaf_types` returns them.
    """
    lines = []
    for name in sorted(stored.keys() | wanted.keys()):
        before = stored[name][:2] if name in stored else None
        now = wanted[name] if name in wanted else None
        if before != now:
            texts = ("absent" if x is None else f"{x[0]}{x[1]}" for x in (before, now))
            lines.append("{}: {} -> {}".format(name, *texts))
    return lines


def seal(record: dict[str, Any]) -> dict[str, Any]:
    """The record with its own SHA-256, as a checkpoint stores it."""
    text = json.dumps(record, sort_keys=True)
    return {"about": record, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def unseal(sealed: Any, step: int) -> dict[str, Any]:
    """The record that `seal` sealed.

    Raises:
        DamageError: it has changed since, or belongs to another step.
    """
    try:
        record = sealed["about"]
        intact = seal(record) == sealed and record["step"] == step
        # Somebody else's seal may close anything.
        usable = isinstance(record["extra"], dict) and _are_leaves(record["leaves"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamageError(first_line(error)) from error
    if not intact:
        raise DamageError("about/metadata does not match its digest")
    if not usable:
        raise DamageError("about/metadata is no record of a checkpoint")
    return record


def _are_leaves(leaves: dict[str, list]) -> bool:
    """Whether a record may be of arrays: {name: [type, shape, digest]}, no name above
    another one."""
    above = {
        name[:at] for name in leaves for at, mark in enumerate(name) if mark == "/"
    }
    return not above & leaves.keys() and all(
        _is_type(kind)
        and isinstance(shape, list)
        and all(type(side) is int and side >= 0 for side in shape)
        and isinstance(sum_, int)
        for kind, shape, sum_ in leaves.values()
    )


def _is_type(kind: Any) -> bool:
    """Whether a text names a type of arrays: that of random keys is called key<...>."""
    if not isinstance(kind, str):
        return False
    try:
        return kind.startswith("key<") or jnp.dtype(kind).kind in "biufcV"
    except TypeError:
        return False


def is_key(leaf: Any) -> bool:
    """True for an array, or a shape, of random keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def name_some(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def first_line(error: Exception) -> str:
    """The class of an error and the first line of its message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


@jax.jit
def _digest_and_finite(leaf: Any) -> tuple[Any, Any]:
    """The digest of a leaf; whether all its numbers are finite, None if they cannot be
    otherwise."""
    floats = jnp.issubdtype(leaf.dtype, jnp.floating)
    return _digest(leaf), jnp.isfinite(leaf).all() if floats else None


def _digest(leaf: Any) -> Any:
    if is_key(leaf):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    width = min(leaf.dtype.itemsize, 4)
    words = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * width}"))
    # The place in row-major order, axis by axis: flattening would gather the shards.
    place, stride = jnp.uint32(0), 1
    for axis in reversed(range(words.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place = place + along * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    weight = (place * jnp.uint32(2654435761)) | jnp.uint32(1)
    return jnp.sum(words.astype(jnp.uint32) * weight, dtype=jnp.uint32)


def _type_of(leaf: Any) -> list:
    return [str(leaf.dtype), list(leaf.shape)]
