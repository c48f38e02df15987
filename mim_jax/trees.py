# SPDX-License-Identifier: Apache-2.0
"""Config trees: made from classes, read, compared, saved, and built into objects.

A plug-in is chosen by its name in a table, never by import path: to load and build a
`config.json` from somebody else runs no code of theirs (docs/security.md).
"""

import dataclasses
import json
import pathlib
import re
import typing
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeGuard

from ml_collections import config_dict

from mim_jax.run import shipped
from mim_jax.run.files import read_json
from mim_jax.run.plugins import check_imported
from mim_jax.schema import (
    ConfigError,
    called,
    check_class,
    check_field,
    check_range,
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


class VariantError(ConfigError):
    """A config file has no such variant.

    Attributes:
        known: the variants that it has.
    """

    def __init__(self, message: str, known: tuple[str, ...]):
        super().__init__(message)
        self.known = known


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
        # A study makes thousands of trees of a few dozen classes.
        self._checked = weakref.WeakSet()

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
                raise VariantError(unknown("variant", part, presets), presets)
            else:
                preset = part
        return preset, choices

    def build(self, tree: Tree) -> Any:
        """The job's dataclass, with every object below it built and its ranges checked.

        Raises:
            ConfigError: naming the leaf and what would be right.
        """
        if not isinstance(tree, config_dict.ConfigDict):
            raise ConfigError(
                f"build({tree!r}): want the tree of a job, from config.experiment, "
                "config.load or the get_config of a file"
            )
        job: Any = tree["job"] if "job" in tree else None
        if job not in self.jobs:
            raise ConfigError(unknown("job", job, self.jobs))
        if "plugins" in tree:
            plugins: Any = tree["plugins"]
            check_imported(plugins, "config")
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
            if (kind := self._kind_of(field.type)) is not None and new is not None:
                name = self._name_of(kind, new, field_path(type(value), field))
                with node.unlocked():
                    node[field.name] = self.choose(kind, name)
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
                word = above.rpartition(".")[2]
                known = node is None and word in (
                    word for word, _ in self.kinds.values()
                )
                raise ConfigError(
                    f"{above} is None: {_choice(word)}"
                    if known
                    else f"{above} is a single value: it has no field {name!r}"
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
        return self.filled(read_json(pathlib.Path(path)), str(path))

    def filled(self, saved: Any, path: str) -> Tree:
        """As `load`, from the parsed JSON of a `config.json`.

        Args:
            path: where it was read, for messages.
        """
        job: Any = saved["job"] if isinstance(saved, dict) and "job" in saved else None
        if job is None:
            raise ConfigError(
                f"{path} names no job: want the config.json of a run of mim_jax"
            )
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

    def changed(self, tree: Tree) -> dict[str, Any]:
        """The leaves that are not `free` and differ from the defaults of the classes
        that the tree names, by path; the name of a plug-in is a leaf, too.

        A leaf that a later version adds is not among them while it has its default.
        """
        cls = self.jobs[tree.job]
        return dict(self._changed(cls, tree, self._tree(cls), "config"))

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
        if cls not in self._checked:
            check_class(cls, self.kinds)
            self._check_shared(cls)
            self._checked.add(cls)
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
        if (plug_in := self._kind_of(kind)) is not None:
            if default is None and plug_in is not kind:
                return None
            name = next(iter(self.kinds[plug_in][1]))
            if missing:
                return self.choose(plug_in, name)
            name = self._name_of(plug_in, default, where)
            return self.write(self.choose(plug_in, name), default)
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
        check_range(value, field, where)
        return config_dict.placeholder(inner) if value is None else value

    def _kind_of(self, annotation: Any) -> type | None:
        """The kind of plug-in that a field takes, be it optional; else None."""
        inner = typing.get_args(annotation)
        if type(None) in inner and len(inner) == 2:
            (annotation,) = (one for one in inner if one is not type(None))
        kind = isinstance(annotation, type) and annotation in self.kinds
        return annotation if kind else None

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
        if (kind := self._kind_of(annotation)) is not None:
            return None if node is None else self.kinds[kind][1][node["name"]]
        return annotation if _is_group(annotation) else None

    def _places(self, tree: Tree, cls: Any, kind: type) -> Iterator[tuple[Tree, str]]:
        """(node, field name) of every field for a plug-in of that kind in a tree."""
        for field in leaf_fields(cls):
            if self._kind_of(field.type) is kind:
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
            if self._kind_of(field.type) and value is not None:
                yield f"{below}.name", value["name"]
            if inner is not None:
                yield from self._decisive(inner, value, below)
            else:
                yield below, _plain(value)

    def _changed(
        self, cls: Any, node: Tree, usual: Tree, path: str
    ) -> Iterator[tuple[str, Any]]:
        """(path, value) of every leaf that is not `free` and not as in `usual`."""
        for field in leaf_fields(cls):
            if "free" in field.metadata:
                continue
            value, base, below = node[field.name], usual[field.name], field.name
            below = f"{path}.{below}"
            kind = self._kind_of(field.type)
            if kind and value is not None and (not base or value.name != base.name):
                yield f"{below}.name", value["name"]
                base = self.choose(kind, value["name"])
            inner = self._class_of(field.type, value)
            if inner is not None:
                yield from self._changed(inner, value, base, below)
            elif _plain(value) != _plain(base):
                yield below, _plain(value)

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
            value = self._value(field.type, node[field.name], below, job)
            check_range(value, field, below)
            values[field.name] = value
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
        kind = self._kind_of(annotation)
        if node is None and kind is not annotation:
            return typed(None, annotation, path)
        if not kind and not _is_group(annotation):
            return typed(node, annotation, path)
        if not isinstance(node, config_dict.ConfigDict):
            raise ConfigError(f"{path}={node!r}: want a group of fields")
        cls = self.chosen(kind, node, path) if kind else annotation
        return self._object(cls, node, path, job)

    def _fill(self, tree: Tree, cls: Any, saved: Any, path: str) -> None:
        """Puts the values of a parsed file into a tree of the class's defaults."""
        if not isinstance(saved, dict):
            raise ConfigError(f"{path}={saved!r}: want a group of fields")
        for field in leaf_fields(cls):
            if field.name not in saved:
                continue
            value, below = saved[field.name], f"{path}.{field.name}"
            kind = self._kind_of(field.type)
            if kind and not (value is None and kind is not field.type):
                value = {"name": value} if isinstance(value, str) else value
                if not isinstance(value, dict):
                    raise ConfigError(f"{below}={value!r}: want a group of fields")
                name = value["name"] if "name" in value else None
                if name is None and "formerly" in field.metadata:
                    name = field.metadata["formerly"]
                if not isinstance(name, str) or name not in self.kinds[kind][1]:
                    message = self._unknown_plug_in(kind, name)
                    raise ConfigError(f"{below}: {message}")
                with tree.unlocked():
                    tree[field.name] = self.choose(kind, name)
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
    plain = tree.to_dict()
    return json.dumps(plain, indent=2, sort_keys=True, allow_nan=False) + "\n"


def read(argument: str) -> Tree:
    """The tree of `configs/FILE.py` or `configs/FILE.py:variant`; or of a file that the
    package ships, by its name: `mae` or `mae:mnist`.

    Raises:
        ConfigError: no such file, or no such variant of it.
    """
    name, *argument_of_file = argument.split(":", 1)
    return shipped.load(shipped.find(name)).get_config(*argument_of_file)


def _plain(value: Any) -> Any:
    """A leaf's value; a list, as JSON has it, becomes a tuple."""
    return tuple(value) if isinstance(value, list) else value


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
    fields = ", ".join(sorted(known)) or "none"
    return f"{path} has no field {name!r}{hint}; it has: {fields}"
