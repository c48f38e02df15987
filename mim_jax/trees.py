# SPDX-License-Identifier: Apache-2.0
"""Config trees: made from classes, read, compared, saved, and built into objects.

A plug-in is chosen by its name in a table, never by import path: it is safe to load a
`config.json` from somebody else.
"""

import dataclasses
import importlib.util
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeGuard

from ml_collections import config_dict

from mim_jax.run.plugins import check_imported
from mim_jax.schema import (
    ConfigError,
    called,
    check_class,
    check_field,
    closest,
    field_path,
    leaf_fields,
    leaf_type,
    shown,
    typed,
    unknown,
)

# A ConfigDict; no type checker knows what its leaves are.
Tree = Any


class Trees:
    """The config trees of several jobs, and the tables of plug-ins that they name.

    Attributes:
        kinds: for the base class of each kind of plug-in, the word for it in configs,
            and the table from names to classes.
        jobs: the dataclass of each job, by name.
    """

    def __init__(
        self,
        kinds: Mapping[type, tuple[str, dict[str, Any]]],
        jobs: Mapping[str, type],
    ):
        self.kinds, self.jobs = kinds, jobs

    def schema(self, cls: Any) -> Tree:
        """A locked tree with one typed leaf per field of a class, at its default.

        Raises:
            ConfigError: the class cannot be configured; names class and field.
        """
        return self._tree(cls)

    def choose(self, kind: type, name: str, /, **values: Any) -> Tree:
        """The node of the plug-in `name` of a kind, with some values set.

        Raises:
            ConfigError: unknown name, with the known ones; or as `schema`.
        """
        word, table = self.kinds[kind]
        if name not in table:
            raise ConfigError(self._unknown_plug_in(kind, name))
        node = self._tree(table[name], name=name)
        for key, value in values.items():
            _set(node, key, value, f"{word} {name!r}")
        return node

    def experiment(self, job: str, **choices: str) -> Tree:
        """The whole tree of a job; `choices` names plug-ins, e.g. objective="mae".

        Raises:
            ConfigError: unknown job or plug-in, with the known ones.
        """
        if job not in self.jobs:
            raise ConfigError(unknown("job", job, self.jobs))
        tree = self._tree(self.jobs[job], job=job)
        words = {word: kind for kind, (word, _) in self.kinds.items()}
        for word in choices:
            if word not in words:
                raise ConfigError(unknown("kind of plug-in", word, words))
        # In the order of the kinds: an objective decides which maskings there are.
        for word, kind in words.items():
            if word not in choices:
                continue
            places = list(self._places(tree, self.jobs[job], kind))
            if not places:
                raise ConfigError(f"{word}={choices[word]}: this config has no {word}")
            for node, name in places:
                with node.unlocked():
                    node[name] = self.choose(kind, choices[word])
        return tree

    def variant(
        self, argument: str | None, presets: tuple[str, ...]
    ) -> tuple[str, dict[str, str]]:
        """The preset and plug-ins of `--config=FILE:photos,masking=grid`.

        Returns:
            (preset or "", {kind: plug-in name}).
        Raises:
            ConfigError: unknown preset or kind, with the known ones.
        """
        preset, choices = "", {}
        words = [word for word, _ in self.kinds.values()]
        for part in filter(None, (argument or "").split(",")):
            if "=" in part:
                word, name = part.split("=", 1)
                if word not in words:
                    raise ConfigError(unknown("kind of plug-in", word, words))
                choices[word] = name
            elif part not in presets:
                raise ConfigError(unknown("variant", part, presets))
            else:
                preset = part
        return preset, choices

    def build(self, tree: Tree) -> Any:
        """The job's dataclass, with every object below it built and its ranges checked.

        Raises:
            ConfigError: naming the leaf and what would be right.
        """
        job: Any = tree["job"] if "job" in tree else None
        if job not in self.jobs:
            raise ConfigError(unknown("job", job, self.jobs))
        if "plugins" in tree:
            check_imported(tree.plugins, "config")
        return self._object(self.jobs[job], tree, "config", tree)

    def build_part(self, tree: Tree, name: str) -> Any:
        """The object of one field of a job, as `build` makes it, without the others.

        Raises:
            ConfigError: as `build`.
        """
        fields = {field.name: field for field in leaf_fields(self.jobs[tree.job])}
        return self._value(fields[name].type, tree[name], f"config.{name}", tree)

    def chosen(self, kind: Any, node: Tree, path: str) -> type:
        """The class that the node of a plug-in names.

        Args:
            path: of the node, for messages.
        Raises:
            ConfigError: unknown name, or the fields are those of another class.
        """
        word, table = self.kinds[kind]
        name: Any = node["name"] if "name" in node else None
        if name not in table:
            raise ConfigError(f"{path}: {self._unknown_plug_in(kind, name)}")
        own = {field.name for field in leaf_fields(table[name])}
        if set(node) - {"name"} != own:
            raise ConfigError(
                f"{path}.name={name!r} has the fields {sorted(own)}, not "
                f"{sorted(set(node) - {'name'})}: {_choice(word, name)}"
            )
        return table[name]

    def write(self, node: Tree, value: Any) -> Tree:
        """Writes the values of an object into a tree of its class; returns the tree."""
        for field in leaf_fields(type(value)):
            new = getattr(value, field.name)
            if self._is_kind(field.type):
                name = self._name_of(field.type, new, field_path(type(value), field))
                with node.unlocked():
                    node[field.name] = self.choose(field.type, name)
            if isinstance(node[field.name], config_dict.ConfigDict):
                self.write(node[field.name], new)
            else:
                node[field.name] = new
        return node

    def check_path(self, tree: Tree, path: str) -> None:
        """Checks that a tree has the leaf "a.b.c" of --config.a.b.c.

        Raises:
            ConfigError: it has none; names the fields that there are.
        """
        node, above = tree, "config"
        for name in path.split("."):
            if not isinstance(node, config_dict.ConfigDict):
                raise ConfigError(
                    f"{above} is a single value: it has no field {name!r}"
                )
            if name not in node:
                raise ConfigError(_no_field(above, name, node))
            node, above = node[name], f"{above}.{name}"
        if isinstance(node, config_dict.ConfigDict):
            chosen: Any = node["name"] if "name" in node else None
            words = [word for word, table in self.kinds.values() if chosen in table]
            raise ConfigError(
                f"{above} is a group: set its fields, {', '.join(sorted(node))}, one "
                "by one" + "".join(f"; {_choice(word)}" for word in words)
            )

    def load(self, path: str | pathlib.Path) -> Tree:
        """The tree of a saved `config.json`.

        Leaves that the file lacks (an older version wrote it) get their defaults.

        Raises:
            ConfigError: the file is no config, needs a module that is not imported,
                names a plug-in or a field that does not exist, or has a value of
                another type.
        """
        try:
            saved = json.loads(pathlib.Path(path).read_text())
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON: {error}") from error
        job: Any = saved["job"] if isinstance(saved, dict) and "job" in saved else None
        if not isinstance(job, str) or job not in self.jobs:
            raise ConfigError(f"{path}: {unknown('job', job, self.jobs)}")
        tree = self.experiment(job)
        modules = {"plugins": saved["plugins"]} if "plugins" in saved else {}
        self._fill(tree, self.jobs[job], modules, f"{path}: config")
        # First of all: the names below may be those that these modules add.
        check_imported(tree.plugins, f"{path}: config")
        fields = {name: saved[name] for name in saved if name != "job"}
        self._fill(tree, self.jobs[job], fields, f"{path}: config")
        return tree

    def difference(self, old: Tree, new: Tree) -> list[str]:
        """Lines "config.a.b: old -> new" for leaves that differ and are not `free`."""
        before = dict(self._decisive(self.jobs[old.job], old, "config"))
        after = dict(self._decisive(self.jobs[new.job], new, "config"))
        before["config.job"], after["config.job"] = old.job, new.job
        missing = "(absent)"
        return [
            f"{name}: {before.get(name, missing)!r} -> {after.get(name, missing)!r}"
            for name in sorted(before.keys() | after.keys())
            if before.get(name, missing) != after.get(name, missing)
        ]

    def register(self, name: str, cls: Any) -> None:
        """Adds a row to the table of the kind that a class derives from.

        Defining a class anew, as a notebook does when its cell runs again, replaces it.

        Raises:
            ConfigError: the class is of no kind or cannot be configured, or the name or
                the class has another row.
        """
        kinds = [
            kind
            for kind in self.kinds
            if isinstance(cls, type) and issubclass(cls, kind)
        ]
        if len(kinds) != 1:
            known = ", ".join(map(called, self.kinds))
            raise ConfigError(
                f"register({name!r}, {called(cls)}): want a subclass of one of {known}"
            )
        word, table = self.kinds[kinds[0]]
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ConfigError(
                f"{word} {name!r} of {called(cls)}: want a name of letters, digits, "
                "'_', '-' and '.'"
            )
        if name in table and called(table[name]) != called(cls):
            raise ConfigError(
                f"{word} {name!r} is {called(table[name])} already: want another name "
                f"for {called(cls)}"
            )
        others = [row for row, other in table.items() if other is cls and row != name]
        if others:
            raise ConfigError(
                f"{called(cls)} is the {word} {others[0]!r} already: want one name, so "
                "that a saved config has one too"
            )
        self._tree(cls, name=name)  # raises if it cannot be configured
        table[name] = cls

    def _tree(self, cls: Any, **first: str) -> Tree:
        """The locked tree of a class, after the leaves `first`."""
        check_class(cls, self.kinds)
        self._check_shared(cls)
        node = config_dict.ConfigDict(first)
        for field in leaf_fields(cls):
            node[field.name] = self._leaf(cls, field)
        return node.lock()

    def _check_shared(self, cls: Any) -> None:
        """Checks that some job has a value for each field that is shared."""
        jobs = self.jobs.values()
        known = {field.name for job in jobs for field in dataclasses.fields(job)}
        for field in dataclasses.fields(cls):
            if "shared" in field.metadata and field.name not in known:
                raise ConfigError(
                    f"{field_path(cls, field)} is shared, but no job has a field "
                    f"{field.name!r}: want a plain default instead of shared(...)"
                )

    def _leaf(self, cls: type, field: dataclasses.Field) -> Any:
        kind: Any = field.type
        default, where = field.default, field_path(cls, field)
        missing = default is dataclasses.MISSING
        check_field(cls, field)
        if self._is_kind(kind):
            name = next(iter(self.kinds[kind][1]))
            if missing:
                return self.choose(kind, name)
            name = self._name_of(kind, default, where)
            return self.write(self.choose(kind, name), default)
        if _is_group(kind):
            if not (missing or isinstance(default, kind)):
                raise ConfigError(
                    f"{where}={default!r}: want an object of {called(kind)}"
                )
            node = self.schema(kind)
            return node if missing else self.write(node, default)
        inner = leaf_type(kind, where)
        if missing:
            raise ConfigError(
                f"{where} has no default: want one, {field.name}: "
                f"{shown(kind)} = DEFAULT"
            )
        value = typed(default, kind, where)
        return config_dict.placeholder(inner) if value is None else value

    def _is_kind(self, annotation: Any) -> TypeGuard[type]:
        return isinstance(annotation, type) and annotation in self.kinds

    def _name_of(self, kind: type, value: Any, where: str) -> str:
        """The name in its table of the class of a plug-in."""
        word, table = self.kinds[kind]
        for name, cls in table.items():
            if cls is type(value):
                return name
        raise ConfigError(
            f"{where}={value!r}: {called(type(value))} is in no table; want an object "
            f"of a class that has a name as {word}: config.register(NAME, CLASS) gives "
            "it one"
        )

    def _class_of(self, annotation: Any, node: Any) -> Any:
        """The class that a node is built into; None if it is a single value."""
        if self._is_kind(annotation):
            return self.kinds[annotation][1][node["name"]]
        return annotation if _is_group(annotation) else None

    def _places(self, tree: Tree, cls: Any, kind: type) -> Iterator[tuple[Tree, str]]:
        """(node, field name) of every field for a plug-in of that kind in a tree."""
        for field in leaf_fields(cls):
            if field.type is kind:
                yield tree, field.name
                continue
            below = self._class_of(field.type, tree[field.name])
            if below is not None:
                yield from self._places(tree[field.name], below, kind)

    def _decisive(self, cls: Any, node: Tree, path: str) -> Iterator[tuple[str, Any]]:
        """(path, value) of every leaf that is not `free`."""
        for field in leaf_fields(cls):
            if "free" in field.metadata:
                continue
            value, below = node[field.name], f"{path}.{field.name}"
            inner = self._class_of(field.type, value)
            if self._is_kind(field.type):
                yield f"{below}.name", value["name"]
            if inner is not None:
                yield from self._decisive(inner, value, below)
            else:
                yield below, tuple(value) if isinstance(value, list) else value

    def _object(self, cls: Any, node: Any, path: str, job: Tree) -> Any:
        fields = leaf_fields(cls)
        known = [field.name for field in fields]
        strangers = set(node) - {*known, "job", "name"}
        if strangers:
            raise ConfigError(_no_field(path, min(strangers), known))
        values = {}
        for field in fields:
            below = f"{path}.{field.name}"
            if field.name not in node:
                raise ConfigError(f"{below} is missing: {cls.__name__} has that field")
            values[field.name] = self._value(field.type, node[field.name], below, job)
        for field in dataclasses.fields(cls):
            if "shared" in field.metadata and field.name in job:
                values[field.name] = job[field.name]
        try:
            return cls(**values)
        except (ValueError, OSError) as error:
            raise ConfigError(
                f"{path}.{error}" if _names_field(error, values) else f"{path}: {error}"
            ) from error

    def _value(self, annotation: Any, node: Any, path: str, job: Tree) -> Any:
        """What a node or leaf is built into, by the annotation of its field."""
        kind = self._is_kind(annotation)
        if not kind and not _is_group(annotation):
            return typed(node, annotation, path)
        if not isinstance(node, config_dict.ConfigDict):
            raise ConfigError(f"{path}={node!r}: want a group of fields")
        cls = self.chosen(annotation, node, path) if kind else annotation
        return self._object(cls, node, path, job)

    def _fill(self, tree: Tree, cls: Any, saved: Any, path: str) -> None:
        """Puts the values of a parsed file into a tree of the class's defaults."""
        if not isinstance(saved, dict):
            raise ConfigError(f"{path}={saved!r}: want a group of fields")
        for field in leaf_fields(cls):
            if field.name not in saved:
                continue
            value, below = saved[field.name], f"{path}.{field.name}"
            if self._is_kind(field.type):
                value = {"name": value} if isinstance(value, str) else value
                if not isinstance(value, dict):
                    raise ConfigError(f"{below}={value!r}: want a group of fields")
                name = value["name"] if "name" in value else None
                if name is None and "formerly" in field.metadata:
                    name = field.metadata["formerly"]
                if not isinstance(name, str) or name not in self.kinds[field.type][1]:
                    message = self._unknown_plug_in(field.type, name)
                    raise ConfigError(f"{below}: {message}")
                with tree.unlocked():
                    tree[field.name] = self.choose(field.type, name)
                value = {key: one for key, one in value.items() if key != "name"}
            inner = self._class_of(field.type, tree[field.name])
            if inner is not None:
                self._fill(tree[field.name], inner, value, below)
            else:
                tree[field.name] = typed(value, field.type, below)
        for name in saved:
            if name not in tree:
                raise ConfigError(_no_field(path, name, tree))

    def _unknown_plug_in(self, kind: type, name: Any) -> str:
        word, table = self.kinds[kind]
        return f"{unknown(word, name, table)}; --plugins=MODULE adds yours"


def dumps(tree: Tree) -> str:
    """The tree as JSON, every value stated."""
    return json.dumps(tree.to_dict(), indent=2, sort_keys=True) + "\n"


def read(argument: str) -> Tree:
    """The tree of `configs/FILE.py` or `configs/FILE.py:variant`.

    Raises:
        ConfigError: no such file, or no such variant of it.
    """
    name, *argument_of_file = argument.split(":", 1)
    path = pathlib.Path(name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        folder = path.parent if path.parent.is_dir() else pathlib.Path("configs")
        known = [str(one) for one in folder.glob("*.py")]
        raise ConfigError(unknown("config file", str(path), known))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*argument_of_file)


def _is_group(annotation: Any) -> TypeGuard[type]:
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


def _set(node: Tree, name: str, value: Any, path: str) -> None:
    if name not in node:
        raise ConfigError(_no_field(path, name, node))
    try:
        node[name] = value
    except TypeError as error:
        raise ConfigError(f"{path}.{name}={value!r}: {error}") from error


def _names_field(error: Exception, values: Mapping[str, Any]) -> bool:
    starts = tuple(f"{name}{sign}" for name in values for sign in "=.")
    return str(error).startswith(starts)


def _choice(word: str, name: str = "NAME") -> str:
    return (
        f"choose the {word} in the config file or by its variant, "
        f"--config=configs/FILE.py:{word}={name}"
    )


def _no_field(path: str, name: str, known: Iterable[str]) -> str:
    known = [field for field in known if field not in ("job", "name")]
    hint = closest(name, known)
    return f"{path} has no field {name!r}{hint}; it has: {', '.join(sorted(known))}"
