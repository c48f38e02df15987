# SPDX-License-Identifier: Apache-2.0
"""Every number that a config states has a range, and none outside it is accepted."""

import contextlib
import dataclasses
import functools
import math
import pathlib
from typing import Any

import pytest
from leaves import Leaf, bounds, kind_of, leaves_of, numbers
from tables import restored

from mim_jax import config
from mim_jax.config import ConfigError
from mim_jax.maskings.base import Masking
from mim_jax.maskings.grid import GridMasking
from mim_jax.schema import Range, check_ranges, free, is_numeric, leaf_fields, within

ROOT = pathlib.Path(__file__).parents[1]
frozen = dataclasses.dataclass(frozen=True, kw_only=True)


@functools.cache
def tree_of(make: Any) -> Any:
    return make()


@contextlib.contextmanager
def with_number(leaf: Leaf, number: int | float):
    """(tree, value) in which this leaf is, or has, that number."""
    tree = tree_of(leaf.tree)
    *above, name = leaf.path.split(".")
    node = functools.reduce(lambda node, part: node[part], above, tree)
    before, default = node[name], leaf.field.default
    value: Any = number
    if isinstance(default, tuple):
        value = (number, *default[1:])
    try:
        node[name] = value
        yield tree, value
    finally:
        node[name] = before


def outside(leaf: Leaf) -> list[int | float]:
    """Numbers that the leaf may not have."""
    range_, kind = bounds(leaf.field), kind_of(leaf.field.type)
    found: list[int | float] = []
    if kind is float:
        found += [math.nan, math.inf, -math.inf]
    for bound, step in (
        (range_.least, -1),
        (range_.above, 0),
        (range_.most, 1),
        (range_.below, 0),
    ):
        if bound is not None:
            found.append(kind(bound) + step * kind(max(1, abs(bound))))
    return found


def test_the_walk_meets_all_classes_with_numbers():
    met = {leaf.owner for leaf in numbers()}
    for _, table in config.KINDS.values():
        for cls in table.values():
            own = [field for field in leaf_fields(cls) if is_numeric(field.type)]
            if own and cls.__module__.startswith("mim_jax."):
                assert cls in met, cls
    assert {config.Train, config.InitFrom, config.RunStudy, config.Spikes} <= met
    assert len(numbers()) > 160


def test_every_number_of_ours_has_a_range():
    lacking = [
        f"{leaf.owner.__module__}.{leaf.owner.__name__}.{leaf.field.name}"
        for leaf in numbers()
        if "range" not in leaf.field.metadata or bounds(leaf.field) == Range()
    ]
    assert not lacking, (
        f"{', '.join(lacking)}: want within(DEFAULT, least=..., most=...) of "
        "mim_jax.schema as the default of the field"
    )


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=str)
def test_every_number_of_every_config_file_has_a_range(path):
    tree = config.read(str(path))
    known = {(leaf.owner, leaf.field.name) for leaf in numbers()}
    for leaf in leaves_of(None, config.JOBS[tree.job], tree):
        assert (leaf.owner, leaf.field.name) in known, leaf.path


def test_no_number_outside_its_range_is_accepted():
    """Each is refused by name, value and bound before anything else looks at it."""
    for leaf in numbers():
        for number in outside(leaf):
            with with_number(leaf, number) as (tree, value):
                with pytest.raises(ConfigError) as caught:
                    config.build(tree)
            said = str(caught.value)
            assert said.startswith(f"config.{leaf.path}={value!r}"[:70]), said
            assert ": want " in said and "\n" not in said


def test_the_bounds_of_a_default_are_kept():
    for leaf in numbers():
        default = leaf.field.default
        values = default if isinstance(default, tuple) else (default,)
        for value in values:
            if value is not None:
                assert value in bounds(leaf.field), leaf.path


# Objects that no config builds.


def test_an_object_is_checked_too():
    with pytest.raises(ValueError, match=r"^cell=1: want 2 <= cell <= 16384$"):
        GridMasking(cell=1)


# What others declare.


class Visible(Masking):
    """The methods of a masking, for classes below that differ in their fields."""

    def visible_count(self, grid):
        return 1

    def __call__(self, keys, grid):
        raise NotImplementedError


@frozen
class Plain(Visible):
    """Declares no range: any finite number will do."""

    share: float = 0.5
    sides: tuple[int, ...] = ()


@frozen
class Declared(Visible):
    share: float = within(0.5, above=0, most=1)
    sides: tuple[int, ...] = within((2, 3), least=1)
    limit: float | None = free(within(None, least=0))

    def __post_init__(self):
        check_ranges(self)


def with_masking(cls, **fields):
    with restored():
        config.register("mine", cls)
        tree = config.experiment("train", source="digits", masking="mine")
        tree.objective.masking.update(fields)
        return config.build(tree).objective.masking


def test_a_plug_in_without_ranges_takes_finite_numbers():
    assert with_masking(Plain, share=-1e9, sides=(-5,)) == Plain(
        share=-1e9, sides=(-5,)
    )
    for value in (math.nan, math.inf):
        with pytest.raises(ConfigError) as caught:
            with_masking(Plain, share=value)
        assert str(caught.value) == (
            f"config.objective.masking.share={value}: want finite numbers only"
        )


@pytest.mark.parametrize(
    "fields, expected",
    [
        (dict(share=0.0), "share=0.0: want 0 < share <= 1"),
        (dict(share=math.nan), "share=nan: want 0 < share <= 1"),
        (dict(sides=(2, 0)), "sides=(2, 0): want at least 1"),
        (dict(sides=()), "sides=(): want at least one number"),
        (dict(limit=-1.0), "limit=-1.0: want at least 0"),
        (dict(limit=math.inf), "limit=inf: want at least 0, and finite"),
    ],
)
def test_a_plug_in_with_ranges_is_held_to_them(fields, expected):
    with pytest.raises(ConfigError) as caught:
        with_masking(Declared, **fields)
    assert str(caught.value) == f"config.objective.masking.{expected}"
    with pytest.raises(ConfigError) as caught:
        Declared(**fields)
    assert str(caught.value) == expected


def test_a_default_outside_its_own_range_is_refused_with_its_class():
    @frozen
    class Wrong(Visible):
        share: float = within(2.0, most=1)

    with restored(), pytest.raises(ConfigError) as caught:
        config.register("wrong", Wrong)
    assert str(caught.value).endswith("Wrong.share=2.0: want at most 1")


def test_marks_of_a_field_can_be_joined():
    marks = {field.name: field.metadata for field in dataclasses.fields(Declared)}
    assert marks["limit"]["free"] and marks["limit"]["range"] == Range(least=0)
    old, new = (config.experiment("train", source="digits") for _ in range(2))
    new.evaluate_every = 3  # free, and within a range
    assert config.difference(old, new) == []
