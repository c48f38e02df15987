# SPDX-License-Identifier: Apache-2.0
"""Cells: one trained run with one seed, and the file that keeps what was measured.

A cell's key is a hash of its config and of the key of the run that it begins with.
Leaves that are free, or that have their default, do not enter it, so that a later
version which adds a leaf finds the cell again. Its file states the whole config, which
is compared when the file is read.
"""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mim_jax import config as configs
from mim_jax.data.sources.base import Source
from mim_jax.data.sources.of_classes import read_names
from mim_jax.evals.base import Eval
from mim_jax.evals.report import Number, Report
from mim_jax.run import files, rundir
from mim_jax.run.parts import newest_leaves
from mim_jax.schema import to_json
from mim_jax.studies import packing, sizes
from mim_jax.studies.grid import Measure, Patches, Study, Times, Training

# They change nothing that is learned, though a resumed run may not change them; the
# key of the run that another one begins with stands for its path.
_NOT_LEARNED = ("config.report", "config.init_from.run")


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    """A run to train with one seed, and all that any study measures on it.

    Attributes:
        name: of its file and of its run directory; ends with the seed and the start of
            the key.
        key: hash of config and parent.
        recipe: config of the run, but for its seed and its parent.
        seed: of the run.
        runs: folder of the run directories.
        parent: the run that it begins with.
        measures: by name.
        undefined: why there can be no such run, e.g. that its units cannot give its
            ratio; "" if there can.
        hidden_share: the share of patches that the masking really hides; None without a
            masking.
        given: the run directory that stands for the run; None: it is trained.
    """

    name: str
    key: str
    recipe: configs.Tree
    seed: int
    runs: pathlib.Path
    parent: "Cell | None"
    measures: dict[str, Measure]
    undefined: str
    hidden_share: float | None
    given: pathlib.Path | None = None

    @property
    def folder(self) -> pathlib.Path:
        """The run directory."""
        return self.given or self.runs / self.name

    @functools.cached_property
    def tree(self) -> configs.Tree:
        """The config of the run; `init_from.run` is the parent's run directory."""
        tree = copy.deepcopy(self.recipe)
        if self.given:
            return tree
        tree.seed = self.seed
        if tree.data.source.name == "few":
            tree.data.source.seed = self.seed
        if self.parent:
            tree.init_from.run = str(self.parent.folder)
        return tree

    @property
    def line(self) -> list["Cell"]:
        """The cell after all that it begins with."""
        return [*(self.parent.line if self.parent else []), self]


class Cells:
    """The cells of studies at one size, each once.

    Args:
        studies: all that are declared: a cell is measured for every one of them.
        settings: of the job.
        runs: folder of the run directories.
    """

    def __init__(
        self,
        studies: Iterable[Study],
        settings: configs.RunStudy,
        runs: pathlib.Path,
    ):
        self.size, self.recipes, self.runs = settings.size, settings.recipes, runs
        self.studies, self.seeds = list(studies), settings.seeds
        self._classes: tuple[str, ...] = ()
        if settings.class_list:
            self._classes = read_names(settings.class_list)
        self._prepared: dict[int, _Prepared] = {}
        self._found: dict[tuple[int, int], Cell] = {}
        self.by_key: dict[str, Cell] = {}
        for study in self.studies:
            for training, measure in study.measures():
                for seed in self.seeds:
                    cell = self.of(training, seed)
                    old = cell.measures.setdefault(measure.name, measure)
                    if old != measure:
                        raise configs.ConfigError(
                            f"study {study.name!r}: measure {measure.name!r} of "
                            f"{cell.name} has other settings in another study: want "
                            "another name"
                        )

    def of_study(self, study: Study) -> list[Cell]:
        """The cells of one study, each after those that it begins with; all of the
        first seed come first."""
        found = [
            cell
            for seed in self.seeds
            for training, _ in study.measures()
            for cell in self.of(training, seed).line
        ]
        return list({cell.key: cell for cell in found}.values())

    def of(self, training: Training, seed: int) -> Cell:
        """The cell of a run with a seed."""
        where = (id(training), seed)
        if where not in self._found:
            cell = self._made(training, seed)
            self._found[where] = self.by_key.setdefault(cell.key, cell)
        return self._found[where]

    def children(self, cell: Cell) -> list[Cell]:
        """The cells that begin with this one."""
        return [one for one in self.by_key.values() if one.parent is cell]

    def _made(self, training: Training, seed: int) -> Cell:
        if training.given:
            return self._given(training)
        if id(training) not in self._prepared:
            self._prepared[id(training)] = _Prepared(training, self._tree(training))
        ready = self._prepared[id(training)]
        parent = None if training.parent is None else self.of(training.parent, seed)
        key = key_of(ready.leaves, seed, parent)
        name = f"{_title(training, self.size)}-s{seed}-{key[:8]}"
        undefined, share = ready.hidden
        if parent and parent.undefined:
            undefined = parent.undefined
        about = (ready.tree, seed, self.runs, parent, {}, undefined, share)
        return Cell(name, key, *about)

    def _given(self, training: Training) -> Cell:
        """The cell of a run that is not trained here; all seeds share it."""
        folder = pathlib.Path(training.given)
        tree = rundir.read_config(folder, f"config.given={training.given!r}")
        step, leaves = newest_leaves(folder)
        text = to_json([configs.changed(tree), step, leaves], sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()
        name = f"{_title(training, self.size)}-s0-{key[:8]}"
        undefined, share = _hidden(tree)
        about = (tree, 0, self.runs, None, {}, undefined, share)
        return Cell(name, key, *about, given=folder)

    def _tree(self, training: Training) -> configs.Tree:
        """The config of a run, but for seed and parent."""
        variant = sizes.variant(training, self.size)
        file = pathlib.Path(self.recipes) / f"{training.recipe}.py"
        tree = configs.read(f"{file}:{variant}" if variant else str(file))
        sizes.shrink(tree, self.size)
        sizes.quiet(tree, self.size)
        tree.compile_cache = False  # one for all runs
        leaves = dict(training.leaves_at(self.size))
        if self._classes:  # of ImageNet, and not of a data set that has only those
            leaves.pop("data.source.dataset", None)
        # The side of a patch comes before what is counted in patches.
        for leaf in sorted(leaves, key=lambda leaf: isinstance(leaves[leaf], Patches)):
            _set(tree, leaf, sizes.value(leaves[leaf], tree, leaf))
        if self._classes:
            picked = dict(source=tree.data.source, names=self._classes)
            with tree.data.unlocked():
                tree.data.source = configs.choose(Source, "classes", **picked)
            if "classes" in tree.objective:
                tree.objective.classes = len(self._classes)
        few = training.few_at(self.size)
        if few is not None:
            source = configs.choose(Source, "few", source=tree.data.source, **few)
            with tree.data.unlocked():
                tree.data.source = source
        return tree


def _set(tree: configs.Tree, leaf: str, value: Any) -> None:
    configs.check_path(tree, leaf)
    *above, last = leaf.split(".")
    for part in above:
        tree = tree[part]
    tree[last] = value


class _Prepared:
    """What the cells of a training have in common.

    Attributes:
        training: held, so that its id stays its own.
        tree: config, but for seed and parent.
        leaves: those that decide what is learned and differ from their defaults.
        hidden: why there can be no such masking, or "", and the share that it hides.
    """

    def __init__(self, training: Training, tree: configs.Tree):
        self.training, self.tree = training, tree
        self.leaves = decisive(tree)
        self.hidden = _hidden(tree)


def decisive(tree: configs.Tree) -> dict[str, Any]:
    """The leaves that decide what a run learns and differ from their defaults, but for
    its seed."""
    leaves = {
        leaf: value
        for leaf, value in configs.changed(tree).items()
        if not leaf.startswith((*_NOT_LEARNED, "config.seed"))
    }
    if tree.stop_after is not None:  # free, and yet two runs that stop apart differ
        leaves["config.stop_after"] = tree.stop_after
    return leaves


def key_of(leaves: Mapping[str, Any], seed: int, parent: Cell | None) -> str:
    """A hash of all that decides what a run learns."""
    text = to_json([leaves, seed, parent.key if parent else None], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _title(training: Training, size: str) -> str:
    """What a reader needs to tell a run from others of its method."""
    words = [] if training.parent is None else [_title(training.parent, size)]
    words.append(training.called or training.recipe)
    if training.variant and size == "full":
        words.append(training.variant)
    words += [training.choices.replace("=", "-")] if training.choices else []
    own = {} if training.called else training.leaves_at(size)
    for leaf, value in own.items():
        short = str(value)
        if isinstance(value, Patches):
            short = f"{value.count}p"
        if isinstance(value, Times):
            short = f"x{value.factor:g}"
        words.append(f"{leaf.split('.')[-1]}-{short}")
    few = {} if training.called else training.few_at(size) or {}
    for name, value in few.items():
        words.append(f"{name}-{value}")
    return re.sub(r"[^\w.+-]+", "_", "-".join(words))[:100].strip("_-")


def _hidden(tree: configs.Tree) -> tuple[str, float | None]:
    """("", share of patches that the masking hides), or (why it cannot, None)."""
    if "masking" not in tree.objective:
        return "", None
    objective = configs.build_objective(tree)
    grid = objective.grid(tree.data.image_size)
    try:
        visible = objective.maskings["masking"].visible_count(grid)
    except ValueError as error:
        return str(error), None
    return "", 1 - visible / grid.size


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one measure found, or why it found nothing.

    Attributes:
        numbers: by name, as in a `Report`.
        arrays: those that the measure keeps.
        missing: why there are none; "" if there are.
    """

    numbers: dict[str, Number]
    arrays: dict[str, np.ndarray]
    missing: str = ""

    @property
    def report(self) -> Report:
        """As the evaluation returned it, with the arrays that were kept."""
        return Report(numbers=self.numbers, arrays=self.arrays)


@dataclasses.dataclass(frozen=True)
class Finished:
    """A cell's file, read.

    Attributes:
        file: all of it, but for what was measured.
        measured: by the name of the measure, for those that still have the settings
            with which they were measured.
    """

    file: dict[str, Any]
    measured: dict[str, Measured]

    def lacks(self, cell: Cell) -> list[str]:
        """Names of the measures that this version can make and the file has not."""
        known = configs.KINDS[Eval][1]
        return [
            name
            for name, measure in cell.measures.items()
            if name not in self.measured and measure.eval in known
        ]


def described(measure: Measure, size: str) -> dict[str, Any]:
    """What decides the numbers of a measure, as JSON."""
    settings = {
        name: sizes.setting(value, size)
        for name, value in measure.settings_at(size).items()
    }
    about = dict(eval=measure.eval, weights=measure.weights, keep=measure.keep)
    return json.loads(to_json(about | {"settings": settings}))


def path_of(folder: pathlib.Path, cell: Cell) -> pathlib.Path:
    """The file of a cell in the folder of cells."""
    return folder / f"{cell.name}.json"


def read(folder: pathlib.Path, cell: Cell, size: str) -> Finished | None:
    """The file of a cell; None if there is none, or if it is of another config, or the
    run that it begins with is.

    The file is found by its key, whatever else is in its name.

    Raises:
        ConfigError: the file is damaged; says how to have it made again.
    """
    if cell.parent and _outdated(folder, cell.parent):
        return None
    for path in _paths(folder, cell):
        try:
            saved = files.read_json(path)
            if saved["key"] != cell.key or stale(saved, cell):
                continue
            measured = {
                name: Measured(
                    {key: _number(one) for key, one in found["numbers"].items()},
                    {key: packing.unpack(one) for key, one in found["arrays"].items()},
                    _text(found["missing"]),
                )
                for name, found in saved.pop("measured").items()
                if name in cell.measures
                and found["how"] == described(cell.measures[name], size)
            }
            _check_about(saved)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise configs.ConfigError(
                f"{path} is no file of a cell ({type(error).__name__}: {error}): want "
                "it removed, and the cell is made again"
            ) from error
        return Finished(saved, measured)
    return None


def _paths(folder: pathlib.Path, cell: Cell) -> list[pathlib.Path]:
    return sorted(folder.glob(f"*-s{cell.seed}-{cell.key[:8]}.json"))


def _outdated(folder: pathlib.Path, cell: Cell) -> bool:
    """Whether the file of a cell is there and of another config, or the run that it
    begins with is."""
    if cell.parent and _outdated(folder, cell.parent):
        return True
    old = []
    for path in _paths(folder, cell):
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            saved = files.read_json(path)
            if saved["key"] == cell.key:
                old.append(bool(stale(saved, cell)))
    return bool(old) and all(old)


def _check_about(saved: Mapping[str, Any]) -> None:
    """TypeError or KeyError unless what pages show of a cell has the right types."""
    _value(saved["minutes"])
    if not isinstance(saved["resumed"], bool):
        raise TypeError(f"resumed={saved['resumed']!r} is no bool")
    for text in (saved["processor"], saved["devices"], *saved["versions"].values()):
        _text(text)


def _number(saved: Mapping[str, Any]) -> Number:
    interval = None
    if saved["interval"]:
        low, high = map(_value, saved["interval"])
        interval = (low, high)
    n = saved["n"] and int(saved["n"])
    return Number(_value(saved["value"]), _text(saved["unit"]), n, interval)


def _value(value: Any) -> float | int:
    if value is None:
        return math.nan  # it was not finite
    if type(value) not in (int, float):
        raise TypeError(f"{value!r} is no number")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def stale(saved: Mapping[str, Any], cell: Cell) -> list[str]:
    """Where the config of a saved cell differs from that of the declared one: a
    default has changed since."""
    return differences(saved["config"], cell.tree, cell.name)


def differences(
    saved: Mapping[str, Any], declared: configs.Tree, name: str
) -> list[str]:
    """Where a saved config would learn something else than the declared one.

    Args:
        name: of the cell, for messages.
    """
    tree = configs.filled(saved, f"cell {name}")
    return [
        line
        for line in configs.difference(tree, declared)
        if not line.startswith(_NOT_LEARNED)
    ]


def write(
    folder: pathlib.Path,
    cell: Cell,
    size: str,
    about: Mapping[str, Any],
    measured: Mapping[str, Measured],
) -> pathlib.Path:
    """Write the file of a cell, whole or not at all.

    Args:
        about: what else the file says, such as its minutes.
    """
    tree = copy.deepcopy(cell.tree)
    if cell.parent:
        tree.init_from.run = cell.parent.name  # not where it lay on this machine
    content = {
        "name": cell.name,
        "key": cell.key,
        "size": size,
        "seed": cell.seed,
        "parent": cell.parent.name if cell.parent else None,
        "hidden_share": cell.hidden_share,
        **about,
        "measured": {
            name: {
                "how": described(cell.measures[name], size),
                "missing": one.missing,
                "numbers": {key: n._asdict() for key, n in one.numbers.items()},
                "arrays": {key: packing.pack(x) for key, x in one.arrays.items()},
            }
            for name, one in measured.items()
        },
        "config": json.loads(configs.dumps(tree)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(folder, cell)
    files.write(path, to_json(content, indent=1) + "\n")
    return path
