# SPDX-License-Identifier: Apache-2.0
"""Every leaf of the configs: where it stands, and which numbers its field takes."""

import atexit
import dataclasses
import functools
import math
import pathlib
import random
import shutil
import tempfile
import typing
from typing import Any

from PIL import Image

from mim_jax import config
from mim_jax.data.sources.base import Source
from mim_jax.schema import Range, is_numeric, leaf_fields


class Leaf(typing.NamedTuple):
    """A number that a config states.

    Attributes:
        tree: makes a tree that has it.
        path: of the leaf, "objective.masking.ratio".
        owner: the class whose field it is.
        field: that field.
    """

    tree: Any
    path: str
    owner: type
    field: dataclasses.Field


def class_below(annotation: Any, node: Any) -> Any:
    """The class of a group of leaves; None for a leaf."""
    if isinstance(annotation, type) and annotation in config.KINDS:
        return config.KINDS[annotation][1][node["name"]]
    return annotation if dataclasses.is_dataclass(annotation) else None


def leaves_of(
    tree: Any, cls: type, node: Any, above: str = "", numeric: bool = True
) -> list[Leaf]:
    """The leaves below a node; `numeric`: of these the numbers alone."""
    found = []
    for field in leaf_fields(cls):
        below = class_below(field.type, node[field.name])
        path = above + field.name
        if below is not None:
            found += leaves_of(tree, below, node[field.name], f"{path}.", numeric)
        elif not numeric or is_numeric(field.type):
            found.append(Leaf(tree, path, cls, field))
    return found


@functools.cache
def images() -> str:
    """A folder of one image for training and one that is held out."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="images-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for split in ("train", "val"):
        path = folder / split / "a" / "0.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(path)
    return str(folder)


def experiment(job: str, **choices: str):
    tree = config.experiment(job, **choices)
    if choices.get("source") == "folder":
        tree.data.source.path = images()
    if job == "train" and choices.get("source") == "few":
        tree.data.source.source = config.choose(Source, "digits")
    needed = dict(eval=dict(run="x"), compare=dict(runs=("x",)))
    needed |= dict(explore=dict(runs=("x",)))
    needed |= dict(study=dict(study="p1_table1"))
    tree.update(needed.get(job, {}))
    return tree


@functools.cache
def makers() -> tuple[Any, ...]:
    """What makes a tree of each job with each plug-in of ours but for tfds."""
    found = [
        functools.partial(experiment, job) for job in ("compare", "explore", "study")
    ]
    usual = dict(source="digits")
    for word, table in config.KINDS.values():
        for name, cls in table.items():
            if not cls.__module__.startswith("mim_jax."):
                continue
            choices = usual | {word: name}
            if word == "tokenizer":
                choices["objective"] = "beit"
            if word == "eval":
                found.append(functools.partial(experiment, "eval", eval=name))
            elif name != "tfds":
                found.append(functools.partial(experiment, "train", **choices))
    return tuple(found)


@functools.cache
def numbers() -> tuple[Leaf, ...]:
    """Each number of each class of ours, once."""
    found = {}
    for make in makers():
        tree = make()
        for leaf in leaves_of(make, config.JOBS[tree.job], tree):
            found.setdefault((leaf.owner, leaf.field.name), leaf)
    return tuple(found.values())


def bounds(field: dataclasses.Field) -> Range:
    return field.metadata["range"]


def kind_of(annotation: Any) -> type:
    """int or float, whichever an annotation is about."""
    inner = typing.get_args(annotation)
    if annotation in (int, float):
        return annotation
    return next(kind_of(one) for one in inner if is_numeric(one))


def numbers_of(one: Any) -> list[tuple[str, Any, dataclasses.Field]]:
    """(path, number, field) of all numbers below a built object."""
    found = []
    for field in leaf_fields(type(one)):
        value = getattr(one, field.name)
        if dataclasses.is_dataclass(value):
            found += [(f"{field.name}.{p}", n, f) for p, n, f in numbers_of(value)]
        elif is_numeric(field.type):
            given = value if isinstance(value, tuple) else (value,)
            found += [(field.name, n, field) for n in given if n is not None]
    return found


def drawn(rng: random.Random, kind: type) -> int | float:
    """A number that may be anything."""
    if kind is int:
        return rng.choice(
            [0, -1, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**63, -(2**63), 10**400]
            + [rng.randrange(-100, 10_000)]
        )
    return rng.choice(
        [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, 5e-324, 1e-300, 1e308, -1e308]
        + [rng.uniform(-2, 2), 10 ** rng.uniform(-9, 9), 10**400]
    )
