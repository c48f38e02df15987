# SPDX-License-Identifier: Apache-2.0
"""What the fields of a dataclass say of its config.

A field states its default once, and becomes one leaf of a config tree
(`mim_jax.trees`). Its annotation says which values the leaf takes, and `within` which
numbers. The functions `shared`, `free`, `internal` and `formerly` mark fields that
differ from this rule:

    >>> @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class Network:
    ...     width: int = within(192, least=4)
    ...     dtype: str = shared("float32")  # the experiment's, not a leaf of its own
    >>> [field.name for field in leaf_fields(Network)]
    ['width']

A class that breaks the rule gets a `ConfigError` that names class, field and remedy.
"""

import contextlib
import dataclasses
import difflib
import inspect
import json
import math
import os
import sysconfig
import traceback
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal

from ml_collections import config_dict

_DECORATOR = "@dataclasses.dataclass(frozen=True, kw_only=True)"
# Where the code of a plug-in does not lie: this package, libraries, Python itself.
_NOT_THEIRS = (
    os.path.dirname(__file__) + os.sep,
    os.path.dirname(os.__file__) + os.sep,
    sysconfig.get_path("purelib") + os.sep,
    "<",
)
_PLAIN = (bool, int, float, str)
_ANNOTATIONS = (
    "bool, int, float, str, Literal[...] of one of these types, tuple[...] of these, "
    "any of these | None, a frozen dataclass, or the base class of a kind of plug-in, "
    "also | None"
)


class ConfigError(ValueError):
    """The user's configuration or data cannot work; the message says what would."""


class DiskError(RuntimeError):
    """A file could not be written, or the run directory is gone; says which and why."""


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds of numbers; None where there is none.

    Attributes:
        least, most: bounds that numbers may have.
        above, below: bounds that they may not have.
    """

    least: int | float | None = None
    above: int | float | None = None
    most: int | float | None = None
    below: int | float | None = None

    def __contains__(self, number: int | float) -> bool:
        return (
            (self.least is None or number >= self.least)
            and (self.above is None or number > self.above)
            and (self.most is None or number <= self.most)
            and (self.below is None or number < self.below)
        )

    @property
    def closed(self) -> bool:
        """Whether there are bounds on both sides, so that all numbers are finite."""
        low = (self.least, self.above) != (None, None)
        return low and (self.most, self.below) != (None, None)

    def wanted(self, name: str) -> str:
        """The bounds in words, for numbers of this name.

        Example:
            >>> Range(least=0, below=1).wanted("ratio"), Range(above=0).wanted("eps")
            ('0 <= ratio < 1', 'more than 0')
        """
        lows = ((self.least, "<=", "at least"), (self.above, "<", "more than"))
        highs = ((self.most, "<=", "at most"), (self.below, "<", "less than"))
        low = [
            (f"{x:.12g} {sign} ", f"{word} {x:.12g}")
            for x, sign, word in lows
            if x is not None
        ]
        high = [
            (f" {sign} {x:.12g}", f"{word} {x:.12g}")
            for x, sign, word in highs
            if x is not None
        ]
        if low and high:
            return f"{low[0][0]}{name}{high[0][0]}"
        return (*low, *high)[0][1] if low or high else "a finite number"


def within(
    default: Any,
    *,
    least: int | float | None = None,
    above: int | float | None = None,
    most: int | float | None = None,
    below: int | float | None = None,
) -> Any:
    """A field whose numbers have bounds: least <= number <= most, above < number <
    below. Of a tuple, each number has them.

    Numbers are finite whatever the field says, since JSON has no others. A field for
    "no limit" can be None: `clip: float | None = within(None, above=0)`. A tuple may be
    empty only if its default is.

    Args:
        default: a value, or what another mark of this module returned.
    """
    return _marked(default, range=Range(least, above, most, below))


def shared(default: Any) -> Any:
    """A field whose value the whole experiment shares, such as `dtype`.

    It has no leaf of its own: building takes the job's field of the same name, or
    `default` where the job has no such field.
    """
    return _marked(default, shared=True)


def free(default: Any) -> Any:
    """A field that a resumed run may change: it has no influence on what is learned."""
    return _marked(default, free=True)


def internal(default: Any) -> Any:
    """A field that the program sets: it is no part of the config."""
    return _marked(default, internal=True)


def formerly(name: str, default: Any) -> Any:
    """A field for a plug-in which older versions had no choice of: it was `name`.

    Configs that they saved state the fields of that plug-in without its name.
    """
    return _marked(default, formerly=name)


def _marked(default: Any, **marks: Any) -> Any:
    if isinstance(default, dataclasses.Field):
        return _marked(default.default, **default.metadata, **marks)
    return dataclasses.field(default=default, metadata=marks)


def check_ranges(one: Any, above: str = "") -> None:
    """ValueError if a number of an object of a dataclass is not finite, or outside the
    range that its field declares. Call it first in `__post_init__`, so that objects
    that no config builds are checked, too.

    Args:
        above: what stands before the names of the fields in messages.
    """
    for field in leaf_fields(type(one)):
        check_range(getattr(one, field.name), field, above + field.name)


def check_range(value: Any, field: dataclasses.Field, path: str) -> None:
    """Checks the numbers of a leaf, if it has any.

    Raises:
        ConfigError: one of them is not finite, or outside the field's range; the
            message names leaf, value and bound.
    """
    bounds = field.metadata["range"] if "range" in field.metadata else Range()
    if value == () and bounds != Range() and field.default != ():
        raise ConfigError(f"{path}=(): want at least one number")
    for number in _numbers(value):
        if number in bounds and (isinstance(number, int) or math.isfinite(number)):
            continue
        name = "each" if isinstance(value, tuple) else field.name
        want = bounds.wanted(name)
        if isinstance(number, float) and not math.isfinite(number):
            if bounds == Range():
                want = "finite numbers only"
            elif not bounds.closed:
                want = f"{want}, and finite"
        raise ConfigError(f"{path}={brief(value)}: want {want}")


def _numbers(value: Any) -> list[int | float]:
    """The numbers of a leaf's value."""
    if isinstance(value, tuple):
        return [number for one in value for number in _numbers(one)]
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return [value] if plain else []


def is_numeric(annotation: Any) -> bool:
    """Whether a leaf with this annotation takes numbers that are not listed in it."""
    if typing.get_origin(annotation) is Literal:
        return False
    inner = typing.get_args(annotation)
    return annotation in (int, float) or any(map(is_numeric, inner))


def leaf_fields(cls: Any) -> list[dataclasses.Field]:
    """The fields of a class that have a leaf in its config tree."""
    # Flax keeps its own bookkeeping in two fields of every module.
    skip = ("parent", "name") if _is_flax(cls) else ()
    return [
        field
        for field in dataclasses.fields(cls)
        if field.init
        and field.name not in skip
        and not field.metadata.keys() & {"shared", "internal"}
    ]


def unknown(word: str, name: Any, known: Iterable[Any]) -> str:
    """The message that a name is unknown, with the known ones and the closest."""
    hint = closest(name, known)
    known = ", ".join(sorted(map(str, known))) or "none"
    return f"{word} {name!r} is unknown{hint}; known: {known}"


def check_class(cls: Any, kinds: Iterable[type]) -> None:
    """Checks that a class can be configured, as far as its fields do not matter.

    Args:
        kinds: the base classes of all kinds of plug-ins.
    Raises:
        ConfigError: it is no frozen dataclass, or lacks what its kind demands.
    """
    name, kinds = called(cls), [kind for kind in kinds if issubclass(cls, kind)]
    if "__dataclass_fields__" not in vars(cls):
        fields = ", ".join(_declared(cls))
        what = f", so its fields {fields} are none" if fields else ""
        raise ConfigError(f"{name} is no dataclass{what}: want {_DECORATOR} above it")
    if not _is_flax(cls) and not cls.__dataclass_params__.frozen:
        raise ConfigError(f"{name} is not frozen: want {_DECORATOR} above it")
    if inspect.isabstract(cls):
        raise ConfigError(
            f"{name} lacks {', '.join(sorted(cls.__abstractmethods__))}: want a method "
            "or property of each name, as "
            f"{' and '.join(called(kind) for kind in kinds)} describes it"
        )
    _check_attributes(cls)
    have = {field.name for field in dataclasses.fields(cls)} | set(dir(cls))
    for base in cls.__mro__[1:]:
        if not any(issubclass(base, kind) for kind in kinds):
            continue
        for field, annotation in _declared(base).items():
            if field not in have:
                raise ConfigError(
                    f"{name} lacks the field {field}, which {called(base)} declares: "
                    f"want {field}: {shown(annotation)} = DEFAULT"
                )


def _check_attributes(cls: type) -> None:
    """ConfigError if a class assigns a value without an annotation, as if it were a
    field, or a str where its base has a tuple."""
    for field, value in vars(cls).items():
        inherited = getattr(cls.__base__, field, None)
        if isinstance(value, str) and isinstance(inherited, tuple):
            raise ConfigError(
                f"{called(cls)}.{field} = {value!r}: want ({value!r},), a tuple"
            )
        if field.startswith("_") or field in inspect.get_annotations(cls):
            continue
        above = cls.__mro__[1:]
        if any(field in _leaves(base) for base in above):
            raise ConfigError(
                f"{called(cls)}.{field} has no annotation, so the field keeps the "
                f"default of its base class: want {field}: TYPE = DEFAULT"
            )
        new = not any(hasattr(one, field) or field in _constants(one) for one in above)
        plain = isinstance(value, _PLAIN + (tuple, list, dict))
        if new and (plain or _is_value(value)):
            kind = type(value).__name__
            raise ConfigError(
                f"{called(cls)}.{field} = {value!r} has no annotation, so it is no "
                f"field: want {field}: {kind} = {value!r}, or ClassVar[{kind}] for a "
                "constant"
            )


def check_field(cls: type, field: dataclasses.Field) -> None:
    """Checks name and default of a field, whatever its type is.

    Raises:
        ConfigError: no leaf of a config can stand for that field.
    """
    where = field_path(cls, field)
    if field.name in ("job", "name") or field.name in dir(config_dict.ConfigDict):
        raise ConfigError(
            f"{where}: config trees use the name {field.name!r} themselves; want "
            "another"
        )
    if field.default_factory is not dataclasses.MISSING:
        raise ConfigError(
            f"{where} has a default_factory, whose result no config can state: want a "
            "plain default, such as a tuple for a list"
        )
    if isinstance(field.type, str):
        raise ConfigError(
            f"{where} is annotated by the string {field.type!r}: want the type itself, "
            "without quotes and without `from __future__ import annotations`"
        )


def leaf_type(annotation: Any, where: str) -> type:
    """The type of the values of a leaf that is no group of others.

    Args:
        where: the field, for messages.
    Raises:
        ConfigError: no leaf can have such values.
    """
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in _PLAIN:
        return annotation
    if origin is Literal and len({type(one) for one in inner}) == 1:
        if type(inner[0]) in _PLAIN:
            return type(inner[0])
    if origin in (types.UnionType, typing.Union) and type(None) in inner:
        rest = [one for one in inner if one is not type(None)]
        if len(rest) == 1:
            return leaf_type(rest[0], where)
    if origin is tuple and inner:
        for one in inner[:1] if inner[1:] == (...,) else inner:
            leaf_type(one, where)
        return tuple
    raise ConfigError(
        f"{where}: no config leaf can be {shown(annotation)}; want {_ANNOTATIONS}"
    )


def typed(value: Any, annotation: Any, path: str) -> Any:
    """A leaf's value as its field declares it: lists become tuples, ints floats.

    Raises:
        ConfigError: it is of another type.
    """
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        if value not in inner:
            raise ConfigError(unknown(path, value, inner))
        return value
    if origin in (types.UnionType, typing.Union) and type(None) in inner:
        if value is None:
            return None
        (annotation,) = (one for one in inner if one is not type(None))
        return typed(value, annotation, path)
    if origin is tuple and isinstance(value, list | tuple):
        kinds = inner[:1] * len(value) if inner[-1] is ... else inner
        if len(kinds) != len(value):
            raise ConfigError(f"{path}={tuple(value)}: want {len(kinds)} values")
        return tuple(map(typed, value, kinds, [path] * len(value)))
    if annotation is float and type(value) is int:
        with contextlib.suppress(OverflowError):  # then it is no float
            return float(value)
    if annotation in _PLAIN and type(value) is annotation:
        return value
    raise ConfigError(f"{path}={value!r}: want {shown(annotation)}")


def called(cls: Any) -> str:
    """A class as messages name it: with its module."""
    return (
        f"{cls.__module__}.{cls.__qualname__}" if isinstance(cls, type) else repr(cls)
    )


def field_path(cls: type, field: dataclasses.Field) -> str:
    """A field as messages name it: with its class and module."""
    return f"{called(cls)}.{field.name}"


def shown(annotation: Any) -> str:
    """An annotation as messages show it."""
    plain = isinstance(annotation, type) and not typing.get_args(annotation)
    return annotation.__name__ if plain else str(annotation)


def returned(value: Any) -> str:
    """What a method returned, as messages show it."""
    return "None (has it a `return`?)" if value is None else brief(value)


def brief(value: Any) -> str:
    """A value as messages show it: on one line, and not long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def to_json(value: Any, **form: Any) -> str:
    """Plain values as JSON, in which a number that is not finite is null: JSON has no
    NaN and no infinity, and readers other than Python's stop at them.

    Args:
        form: how it is laid out, as for `json.dumps`.

    Example:
        >>> to_json({"psnr": math.inf, "interval": (math.nan, 1.5)})
        '{"psnr": null, "interval": [null, 1.5]}'
    """
    return json.dumps(_stated(value), allow_nan=False, **form)


def _stated(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _stated(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_stated(one) for one in value]
    odd = isinstance(value, float) and not math.isfinite(value)
    return None if odd else value


def raised(error: Exception) -> str:
    """What an error of a plug-in's own code says and where it was raised, on one
    line."""
    why = " ".join(f"{type(error).__name__}: {error}".split())
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [one for one in frames if not one.filename.startswith(_NOT_THEIRS)]
    for frame in (theirs or frames)[-1:]:
        why += f" ({frame.filename}:{frame.lineno})"
    return why


def closest(name: Any, known: Iterable[Any]) -> str:
    """What a message adds to a name that may be misspelt; "" if no name is close."""
    close = difflib.get_close_matches(str(name), list(map(str, known)), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _declared(cls: type) -> dict[str, Any]:
    """The annotations of a class itself that are no ClassVar."""
    found = inspect.get_annotations(cls)
    return {
        name: annotation
        for name, annotation in found.items()
        if typing.ClassVar not in (annotation, typing.get_origin(annotation))
    }


def _constants(cls: type) -> set[str]:
    """The annotations of a class itself that are a ClassVar."""
    return inspect.get_annotations(cls).keys() - _declared(cls).keys()


def _leaves(cls: type) -> set[str]:
    """The fields of a dataclass that a config can set."""
    if not dataclasses.is_dataclass(cls):
        return set()
    return {field.name for field in dataclasses.fields(cls) if field.init}


def _is_value(value: Any) -> bool:
    """Whether this is an object of a dataclass, such as a network."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _is_flax(cls: Any) -> bool:
    return any(base.__module__.split(".")[0] == "flax" for base in cls.__mro__)
