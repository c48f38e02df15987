# SPDX-License-Identifier: Apache-2.0
"""Configurations: trees of typed leaves generated from the classes that they build.

A default is written once, in the field of a dataclass. `schema` turns a class into a
locked ConfigDict with one leaf per field, `build` turns such a tree into the object.
Plug-ins are chosen by name from the tables of KINDS, never by import path, so a
`config.json` from somebody else is safe to load.
"""

import dataclasses
import difflib
import importlib.util
import json
import pathlib
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from ml_collections import config_dict

from mim_jax.data.pipeline import Input
from mim_jax.data.sources import SOURCES
from mim_jax.data.sources.base import Source
from mim_jax.evals import EVALS
from mim_jax.evals.attention import Attention
from mim_jax.evals.base import Eval
from mim_jax.evals.cka import CKA
from mim_jax.evals.knn import KNN
from mim_jax.evals.reconstruction import Reconstruction
from mim_jax.evals.tsne import TSNE
from mim_jax.maskings import MASKINGS
from mim_jax.maskings.base import Masking
from mim_jax.models.vit import REMAT
from mim_jax.objectives import OBJECTIVES
from mim_jax.objectives.base import Objective
from mim_jax.objectives.mae import MAE
from mim_jax.optim import OPTIMISERS, AdamW, Optimiser
from mim_jax.run.checkpoint import Checkpoints
from mim_jax.run.log import Log
from mim_jax.run.profiler import traced_steps
from mim_jax.sharding import Mesh
from mim_jax.tokenizers import TOKENIZERS
from mim_jax.tokenizers.base import Tokenizer

KINDS: dict[type, tuple[str, dict[str, type]]] = {
    Objective: ("objective", OBJECTIVES),
    Masking: ("masking", MASKINGS),
    Tokenizer: ("tokenizer", TOKENIZERS),
    Source: ("source", SOURCES),
    Eval: ("eval", EVALS),
    Optimiser: ("optimiser", OPTIMISERS),
}

# Configs saved before these were plug-ins have no name of one.
_ONCE_GROUPS = (Optimiser,)

# Fields of any class that are set once for the whole experiment.
SHARED = ("dtype", "remat")

# Not part of a class's configuration: flax keeps its own bookkeeping in these.
_FLAX = ("parent", "name")
_TRAINER = ("total_steps",)  # the trainer sets these

# A run may be resumed with another value here: none changes a number that is learned.
FREE = ("stop_after", "log", "checkpoint", "compile_cache", "profile", "on_change")
FREE_IN_DATA = ("workers", "threads", "prefetch")

DTYPES = ("bfloat16", "float32", "float64")


# A ConfigDict; no type checker knows what its leaves are.
Tree = Any


class ConfigError(ValueError):
    """The user's configuration or data cannot work; the message says what would."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitFrom:
    """The run whose parameters another one begins with.

    Attributes:
        run: run directory; "" begins from scratch. It decides the form of the network.
        step: checkpoint to read; None is the newest.
        weights: "trained", or "teacher": the averaged ones of methods that have them.
        parts: paths of parameters to take, with all below them.
    """

    run: str = ""
    step: int | None = None
    weights: Literal["trained", "teacher"] = "trained"
    parts: tuple[str, ...] = ("encoder",)

    def __post_init__(self):
        if self.run and not self.parts:
            raise ValueError(f"parts={self.parts}: want at least one, such as encoder")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Job "train": the one loop, for any objective.

    Attributes:
        seed: of parameters, data order, crops and masks.
        epochs: passes over the source; `steps`, if set, decides instead and keeps the
            warm-up's share of the run.
        epoch_images: images drawn in what counts as an epoch; None is the size of the
            source. ImageNet's 1,281,167 gives few images the steps of many.
        steps: optimiser steps of the whole run: its length and the schedule's horizon.
        stop_after: end early, after this many steps in all; the schedule is unchanged.
        batch_size: images per step, over all devices.
        accumulate: micro-batches per step.
        accumulate_coupled: let objectives whose examples depend on each other work per
            micro-batch, which is another loss.
        dtype: of activations; parameters, statistics and losses stay float32.
        init_from: a run to begin with.
        scan: run the blocks as one loop: compiles faster, same result.
        remat: what the backward pass recomputes: none, dots (all but matmuls), full.
        on_change: "refuse" or "accept" to resume a run with another config.
        compile_cache: keep compiled programs under the work directory.
        profile: "FIRST:COUNT" writes a trace of COUNT steps, the first being FIRST
            (counted from 1), to the folder profile/ of the run.
    """

    seed: int = 0
    epochs: float = 100.0
    epoch_images: int | None = None
    steps: int | None = None
    stop_after: int | None = None
    batch_size: int = 1024
    accumulate: int = 1
    accumulate_coupled: bool = False
    dtype: str = "bfloat16"
    scan: bool = True
    remat: str = "dots"
    init_from: InitFrom = InitFrom()
    objective: Objective = MAE()
    data: Input
    optim: Optimiser = AdamW()
    mesh: Mesh = Mesh()
    checkpoint: Checkpoints = Checkpoints()
    log: Log = Log()
    report: Eval = Reconstruction()
    on_change: str = "refuse"
    compile_cache: bool = True
    profile: str = ""

    def __post_init__(self):
        for name in ("steps", "stop_after", "epoch_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: want at least 1")
        if self.epochs <= 0:
            raise ValueError(f"epochs={self.epochs}: want a number > 0")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed={self.seed}: want 0 <= seed < 2**31")
        if self.batch_size < 1 or self.accumulate < 1:
            raise ValueError(
                f"batch_size={self.batch_size}, accumulate={self.accumulate}: want "
                "at least 1"
            )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size={self.batch_size} in accumulate={self.accumulate} "
                "micro-batches: want a multiple"
            )
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("remat", self.remat, REMAT)
        _one_of("on_change", self.on_change, ("refuse", "accept"))
        traced_steps(self.profile)  # raises if it is none
        self.optim.schedule(self.batch_size, self.epochs, 1)  # raises if it cannot be


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Job "eval": one evaluation of a run, which says itself what it is.

    Attributes:
        run: run directory; its own config decides architecture and data.
        also: further run directories, measured alike, for figures side by side; their
            images must be of the same source and size.
        step: checkpoint to read; None is the newest.
        weights: "trained"; "teacher", the averaged ones of methods that have them; or
            "initial", new ones by the run's seed: the random baseline.
        eval: what to measure.
    """

    run: str = ""
    also: tuple[str, ...] = ()
    step: int | None = None
    weights: Literal["trained", "teacher", "initial"] = "trained"
    eval: Eval = Reconstruction()

    def __post_init__(self):
        if not self.run:
            raise ValueError(
                "run is empty: name a run directory, e.g. --config.run=runs/mae"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare:
    """Job "compare": several runs on one page.

    Attributes:
        runs: run directories that read the same images.
        step: checkpoint to read of each; None is the newest.
        random: show the first run before training, too.
        skip: evaluations to leave out, by name.
        also: further evaluations, by name, with their defaults.
        reconstruction, knn, cka, attention, tsne: what is measured.
    """

    runs: tuple[str, ...] = ()
    step: int | None = None
    random: bool = True
    skip: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    reconstruction: Reconstruction = Reconstruction(draws=1, inpainted=0)
    knn: KNN = KNN(k=(10,), rows=5)
    cka: CKA = CKA(images=2000, occlusion="model")
    attention: Attention = Attention(rows=4)
    tsne: TSNE = TSNE()

    def __post_init__(self):
        if not self.runs:
            raise ValueError(
                "runs is empty: name run directories, e.g. "
                """--config.runs='("runs/mae","runs/cmae")'"""
            )
        for name in self.skip:
            _one_of("skip", name, self._groups)
        for name in self.also:
            _one_of("also", name, EVALS)
            if name in self._groups:
                raise ValueError(
                    f"also={name!r}: the page has it already; set --config.{name}.*"
                )

    @property
    def evaluations(self) -> dict[str, Eval]:
        """What is measured, by name, in the order of the page."""
        found = {n: one for n, one in self._groups.items() if n not in self.skip}
        return found | {name: EVALS[name]() for name in self.also}

    @property
    def _groups(self) -> dict[str, Eval]:
        """The evaluations that have config leaves here."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: one for name, one in values.items() if isinstance(one, Eval)}


JOBS = {"train": Train, "eval": Evaluate, "compare": Compare}


def schema(cls: Any) -> Tree:
    """A locked tree with one typed leaf per field of a class, at its default."""
    node = config_dict.ConfigDict()
    for field in _fields(cls):
        node[field.name] = _leaf(field, field.type)
    return node.lock()


def choose(kind: type, name: str, /, **values) -> Tree:
    """The node of the plug-in `name` of an abstract class, with some values set.

    Raises:
        ConfigError: unknown name, with the known ones.
    """
    word, table = KINDS[kind]
    if name not in table:
        raise ConfigError(_unknown(word, name, table))
    node = config_dict.ConfigDict({"name": name})
    for field in _fields(table[name]):
        node[field.name] = _leaf(field, field.type)
    node.lock()
    for key, value in values.items():
        _set(node, key, value, f"{word} {name!r}")
    return node


def experiment(job: str, **choices: str) -> Tree:
    """The whole tree of a job; `choices` names plug-ins, e.g. objective="mae".

    Raises:
        ConfigError: unknown job or plug-in, with the known ones.
    """
    if job not in JOBS:
        raise ConfigError(_unknown("job", job, JOBS))
    tree = config_dict.ConfigDict({"job": job})
    for field in _fields(JOBS[job]):
        tree[field.name] = _leaf(field, field.type)
    tree.lock()
    words = {word: kind for kind, (word, _) in KINDS.items()}
    for word in choices:
        if word not in words:
            raise ConfigError(_unknown("kind of plug-in", word, words))
    for word, kind in words.items():  # objectives first: they decide what follows
        if word not in choices:
            continue
        places = list(_places(tree, JOBS[job], kind))
        if not places:
            raise ConfigError(f"{word}={choices[word]}: this config has no {word}")
        for node, name in places:
            with node.unlocked():
                node[name] = choose(kind, choices[word])
    return tree


def variant(argument: str | None, presets: tuple[str, ...]) -> tuple[str, dict]:
    """Reads what follows the colon in `--config=configs/mae.py:photos,masking=grid`.

    Returns:
        (preset or "", {kind: plug-in name}).
    Raises:
        ConfigError: unknown preset or kind, with the known ones.
    """
    preset, choices = "", {}
    for word in filter(None, (argument or "").split(",")):
        if "=" in word:
            kind, name = word.split("=", 1)
            kinds = [word for word, _ in KINDS.values()]
            if kind not in kinds:
                raise ConfigError(_unknown("kind of plug-in", kind, kinds))
            choices[kind] = name
        elif word not in presets:
            raise ConfigError(_unknown("variant", word, presets))
        else:
            preset = word
    return preset, choices


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
        raise ConfigError(_unknown("config file", str(path), known))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*argument_of_file)


def build(tree: Tree) -> Any:
    """The job's dataclass, with every object below it built and its ranges checked.

    Raises:
        ConfigError: naming the leaf and what would be right.
    """
    job = tree["job"] if "job" in tree else None
    if job not in JOBS:
        raise ConfigError(_unknown("job", job, JOBS))
    shared = {name: tree[name] for name in SHARED if name in tree}
    return _build(JOBS[job], tree, "config", shared)


def build_objective(tree: Tree) -> Objective:
    """The objective of a training job alone: its data need not be here.

    Raises:
        ConfigError: as `build`.
    """
    shared = {name: tree[name] for name in SHARED if name in tree}
    return _build(objective_class(tree), tree.objective, "config.objective", shared)


def objective_class(tree: Tree) -> type[Objective]:
    """The class of a training job's objective."""
    return _chosen(Objective, tree.objective, "config.objective")


def check_path(tree: Tree, path: str) -> None:
    """Holds "a.b.c" of --config.a.b.c against a tree.

    Raises:
        ConfigError: there is no such leaf, with those that there are.
    """
    node, above = tree, "config"
    for name in path.split("."):
        if not isinstance(node, config_dict.ConfigDict):
            raise ConfigError(f"{above} is a single value: it has no field {name!r}")
        if name not in node:
            raise ConfigError(_no_field(above, name, node))
        node, above = node[name], f"{above}.{name}"
    if isinstance(node, config_dict.ConfigDict):
        words = [word for word, table in KINDS.values() if node.get("name") in table]
        raise ConfigError(
            f"{above} is a group: set its fields, {', '.join(sorted(node))}, one by one"
            + "".join(f"; {_choice(word)}" for word in words)
        )


def dumps(tree: Tree) -> str:
    """The tree as JSON, every value stated."""
    return json.dumps(tree.to_dict(), indent=2, sort_keys=True) + "\n"


def load(path: str | pathlib.Path) -> Tree:
    """The tree of a saved `config.json`.

    Leaves that the file lacks (it was written by an older version) get their defaults.

    Raises:
        ConfigError: the file is no config, names a plug-in or a field that does not
            exist, or has a value of another type.
    """
    try:
        saved = json.loads(pathlib.Path(path).read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    job = saved.pop("job", None) if isinstance(saved, dict) else None
    if job not in JOBS:
        raise ConfigError(f"{path}: {_unknown('job', job, JOBS)}")
    tree = experiment(job)
    _fill(tree, JOBS[job], saved, f"{path}: config")
    return tree


def difference(old: Tree, new: Tree) -> list[str]:
    """Lines "config.a.b: old -> new" of all that a resumed run must not change."""

    def flat(tree, prefix="config"):
        for name, value in tree.items():
            data_free = prefix == "config.data" and name in FREE_IN_DATA
            if (prefix == "config" and name in FREE) or data_free:
                continue
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}.{name}")
            else:
                yield f"{prefix}.{name}", _plain(value)

    before, after = dict(flat(old.to_dict())), dict(flat(new.to_dict()))
    missing = "(absent)"
    return [
        f"{name}: {before.get(name, missing)!r} -> {after.get(name, missing)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name, missing) != after.get(name, missing)
    ]


def _fields(cls: Any) -> list[dataclasses.Field]:
    skip = _FLAX + _TRAINER + (() if cls in JOBS.values() else SHARED)
    return [field for field in dataclasses.fields(cls) if field.name not in skip]


def _leaf(field: dataclasses.Field, kind: Any) -> Any:
    default = field.default
    if kind in KINDS:
        _, table = KINDS[kind]
        if default is dataclasses.MISSING:
            name = next(iter(table))
            return choose(kind, name)
        names = {cls: name for name, cls in table.items()}
        node = choose(kind, names[type(default)])
        return _default_values(node, default)
    if _is_group(kind):
        node = schema(kind)
        if default is dataclasses.MISSING:
            return node
        return _default_values(node, default)
    if default is dataclasses.MISSING:
        raise TypeError(f"field {field.name!r} needs a default to have a config leaf")
    if default is None:
        (inner,) = (arg for arg in typing.get_args(kind) if arg is not type(None))
        return config_dict.placeholder(inner)
    return default


def _default_values(node: Tree, value: Any) -> Tree:
    """A default object may differ from its class's defaults: Encoder(width=192)."""
    for field in _fields(type(value)):
        current = getattr(value, field.name)
        if field.type in KINDS:
            names = {cls: name for name, cls in KINDS[field.type][1].items()}
            with node.unlocked():
                node[field.name] = choose(field.type, names[type(current)])
        if isinstance(node[field.name], config_dict.ConfigDict):
            _default_values(node[field.name], current)
        else:
            node[field.name] = current
    return node


def _is_group(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind)


def _places(tree: Tree, cls: Any, kind: type) -> Iterator[tuple]:
    """(node, field name) of every field of an abstract type in a tree."""
    for field in _fields(cls):
        if field.type is kind:
            yield tree, field.name
        elif field.type in KINDS:
            chosen = KINDS[field.type][1][tree[field.name]["name"]]
            yield from _places(tree[field.name], chosen, kind)
        elif _is_group(field.type):
            yield from _places(tree[field.name], field.type, kind)


def _build(cls: Any, node: Any, path: str, shared: dict) -> Any:
    if not isinstance(node, config_dict.ConfigDict):
        raise ConfigError(f"{path}={node!r}: want a group of fields")
    fields = _fields(cls)
    strangers = set(node) - {field.name for field in fields} - {"job", "name"}
    if strangers:
        known = [field.name for field in fields]
        raise ConfigError(_no_field(path, min(strangers), known))
    values = {}
    for field in fields:
        below = f"{path}.{field.name}"
        if field.name not in node:
            raise ConfigError(f"{below} is missing: {cls.__name__} has that field")
        value = node[field.name]
        if field.type in KINDS:
            value = _build(_chosen(field.type, value, below), value, below, shared)
        elif _is_group(field.type):
            value = _build(field.type, value, below, shared)
        else:
            value = _typed(value, field.type, below)
        values[field.name] = value
    if cls not in JOBS.values():
        names = [field.name for field in dataclasses.fields(cls)]
        values |= {name: value for name, value in shared.items() if name in names}
    try:
        return cls(**values)
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"{path}.{error}" if _names_field(error, values) else f"{path}: {error}"
        ) from error


def _chosen(kind: type, node: Any, path: str) -> type:
    """The class that a plug-in's node names, if its fields are that class's."""
    word, table = KINDS[kind]
    name = node["name"] if "name" in node else None
    if name not in table:
        raise ConfigError(f"{path}: {_unknown(word, name, table)}")
    own = {field.name for field in _fields(table[name])}
    if set(node) - {"name"} != own:
        raise ConfigError(
            f"{path}.name={name!r} has the fields {sorted(own)}, not "
            f"{sorted(set(node) - {'name'})}: {_choice(word, name)}"
        )
    return table[name]


def _choice(word: str, name: str = "NAME") -> str:
    return (
        f"choose the {word} in the config file or by its variant, "
        f"--config=configs/FILE.py:{word}={name}"
    )


def _typed(value: Any, kind: Any, path: str) -> Any:
    """A leaf's value as its field declares it: lists become tuples, ints floats."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        if value not in inner:
            raise ConfigError(_unknown(path, value, inner))
        return value
    if origin in (types.UnionType, typing.Union) and type(None) in inner:
        if value is None:
            return None
        (kind,) = (one for one in inner if one is not type(None))
        return _typed(value, kind, path)
    if origin is tuple and isinstance(value, list | tuple):
        kinds = inner[:1] * len(value) if inner[-1] is ... else inner
        if len(kinds) != len(value):
            raise ConfigError(f"{path}={tuple(value)}: want {len(kinds)} values")
        return tuple(map(_typed, value, kinds, [path] * len(value)))
    if kind is float and type(value) is int:
        return float(value)
    if kind in (bool, int, float, str) and type(value) is kind:
        return value
    raise ConfigError(f"{path}={value!r}: want {getattr(kind, '__name__', kind)}")


def _names_field(error: Exception, values: dict) -> bool:
    starts = tuple(f"{name}{sign}" for name in values for sign in "=.")
    return str(error).startswith(starts)


def _fill(tree: Tree, cls: Any, saved: Any, path: str) -> None:
    """Puts the values of a parsed file into a tree of the class's defaults."""
    if not isinstance(saved, dict):
        raise ConfigError(f"{path}={saved!r}: want a group of fields")
    for field in _fields(cls):
        if field.name not in saved:
            continue
        value, below = saved[field.name], f"{path}.{field.name}"
        if field.type in KINDS:
            word, table = KINDS[field.type]
            if not isinstance(value, dict | str):
                raise ConfigError(f"{below}={value!r}: want a group of fields")
            name = value.get("name") if isinstance(value, dict) else value
            if name is None and field.type in _ONCE_GROUPS:
                name = tree[field.name]["name"]
            if name not in table:
                raise ConfigError(f"{below}: {_unknown(word, name, table)}")
            with tree.unlocked():
                tree[field.name] = choose(field.type, name)
            fields = {} if isinstance(value, str) else value  # a name alone: defaults
            rest = {key: fields[key] for key in fields if key != "name"}
            _fill(tree[field.name], table[name], rest, below)
        elif _is_group(field.type):
            _fill(tree[field.name], field.type, value, below)
        else:
            tree[field.name] = _typed(value, field.type, below)
    for name in saved:
        if name not in tree:
            raise ConfigError(_no_field(path, name, tree))


def _set(node: Tree, name: str, value: Any, path: str) -> None:
    if name not in node:
        raise ConfigError(_no_field(path, name, node))
    try:
        node[name] = value
    except TypeError as error:
        raise ConfigError(f"{path}.{name}={value!r}: {error}") from error


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _one_of(name: str, value: Any, known) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown; known: {', '.join(known)}")


def _unknown(word: str, name: Any, known) -> str:
    hint = _close(name, known)
    known = ", ".join(sorted(map(str, known))) or "none"
    return f"{word} {name!r} is unknown{hint}; known: {known}"


def _no_field(path: str, name: str, known) -> str:
    known = [field for field in known if field not in ("job", "name")]
    hint = _close(name, known)
    return f"{path} has no field {name!r}{hint}; it has: {', '.join(sorted(known))}"


def _close(name: Any, known) -> str:
    close = difflib.get_close_matches(str(name), list(map(str, known)), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
