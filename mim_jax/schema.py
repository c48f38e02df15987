# SPDX-License-Identifier: Apache-2.0
"""What the fields of a dataclass say of its config.

A field states its default once, and becomes one leaf of a config tree
(`mim_jax.trees`). Its annotation says which values the leaf takes. The functions
`shared`, `free`, `internal` and `formerly` mark fields that differ from this rule:

    >>> @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class Network:
    ...     width: int = 192
    ...     dtype: str = shared("float32")  # the experiment's, not a leaf of its own
    >>> [field.name for field in leaf_fields(Network)]
    ['width']

A class that breaks the rule gets a `ConfigError` that names class, field and remedy.
"""

import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal

from ml_collections import config_dict

_DECORATOR = "@dataclasses.dataclass(frozen=True, kw_only=True)"
_PLAIN = (bool, int, float, str)
_ANNOTATIONS = (
    "bool, int, float, str, Literal[...] of one of these types, tuple[...] of these, "
    "any of these | None, a frozen dataclass, or the base class of a kind of plug-in"
)


class ConfigError(ValueError):
    """The user's configuration or data cannot work; the message says what would."""


def shared(default: Any) -> Any:
    """A field whose value the whole experiment shares, such as `dtype`.

    It has no leaf of its own: building takes the job's field of the same name, or
    `default` where the job has no such field.
    """
    return dataclasses.field(default=default, metadata={"shared": True})


def free(default: Any) -> Any:
    """A field that a resumed run may change: it has no influence on what is learned."""
    return dataclasses.field(default=default, metadata={"free": True})


def internal(default: Any) -> Any:
    """A field that the program sets: it is no part of the config."""
    return dataclasses.field(default=default, metadata={"internal": True})


def formerly(name: str, default: Any) -> Any:
    """A field for a plug-in which older versions had no choice of: it was `name`.

    Configs that they saved state the fields of that plug-in without its name.
    """
    return dataclasses.field(default=default, metadata={"formerly": name})


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


def _is_flax(cls: Any) -> bool:
    return any(base.__module__.split(".")[0] == "flax" for base in cls.__mro__)
