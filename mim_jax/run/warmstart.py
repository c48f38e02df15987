# SPDX-License-Identifier: Apache-2.0
"""Starts a run from the parameters of another run: fine-tuning and probing."""

import copy
import dataclasses
import functools
import operator
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from mim_jax import config as configs
from mim_jax import sharding
from mim_jax import state as states
from mim_jax.ops.patches import Grid, sincos_2d
from mim_jax.ops.posembed import resized
from mim_jax.run import files, hosts, rundir
from mim_jax.run.parts import read_parts
from mim_jax.state import TrainState

_POSITIONS = "encoder/pos_embed"
_NORM = "encoder/norm"


def adopt(config: configs.Tree, workdir: files.Place | None = None) -> configs.Tree:
    """The config, with the settings that it adopts from the run that config.init_from
    names: those of the objective (`Objective.adopt`) and the parts of `data` in
    config.init_from.data.

    Once the new run has a config.json, these settings are read from there: the other
    run may no longer exist.

    Args:
        config: of the new run.
        workdir: directory of the new run.
    Raises:
        ConfigError: config.init_from.run is no training run, or config.init_from.keep
            or .data names nothing.
    """
    if not config.init_from.run:
        return config
    named = f"config.init_from.run={config.init_from.run!r}"
    folder = files.place(config.init_from.run)
    if workdir is not None:
        if files.absolute(folder) == files.absolute(workdir):
            raise configs.ConfigError(f"{named} is the --workdir: want another one")
        own = rundir.saved_config(workdir)
        if own is not None and own["job"] == config.job:
            folder = workdir
    saved = rundir.read_config(folder, named)
    objective = configs.build_objective(config).adopt(configs.build_objective(saved))
    adopted = copy.deepcopy(config)
    configs.write(adopted.objective, objective)
    for leaf in config.init_from.keep:
        configs.check_path(config, f"objective.{leaf}")
        *above, name = leaf.split(".")
        node = functools.reduce(operator.getitem, above, adopted.objective)
        node[name] = value_of(config, f"objective.{leaf}")
    for part in config.init_from.data:
        if part not in config.data or part not in saved.data:
            raise configs.ConfigError(
                f"config.init_from.data names {part!r}: want names of leaves or groups "
                f"of config.data: {', '.join(sorted(config.data))}"
            )
        theirs = saved.data[part]
        while part == "source" and theirs.name == "few" and folder != workdir:
            theirs = theirs.source  # a few images pre-train, and all labels fine-tune
        with adopted.data.unlocked():
            adopted.data[part] = copy.deepcopy(theirs)
    return adopted


def counted(config: configs.Tree) -> configs.Tree:
    """The config, with as many classes as the source has, if config.count_classes.

    Raises:
        ConfigError: the source cannot be opened.
    """
    if not config.count_classes or "classes" not in config.objective:
        return config
    source = configs.build_source(config)
    classes = source.classes or source.object_classes
    if not classes:
        return config  # the plan refuses it, and says why
    filled = copy.deepcopy(config)
    filled.objective.classes = len(classes)
    return filled


def check_given(
    config: configs.Tree, leaves: Iterable[str], workdir: files.Place | None = None
) -> None:
    """Refuse values that a user gave, and that the other run would replace.

    Args:
        leaves: paths of those that were given, such as "objective.pool".
        workdir: as for `adopt`.
    Raises:
        ConfigError: naming such a leaf, both values and what to do.
    """
    adopted = adopt(config, workdir)
    for leaf in leaves:
        mine, theirs = (value_of(tree, leaf) for tree in (config, adopted))
        if mine != theirs:
            name = leaf.removeprefix("objective.")
            raise configs.ConfigError(
                f"config.{leaf}={mine!r}: {config.init_from.run} decides it, and has "
                f"{theirs!r}: want no value here, or yours in spite of that, by "
                f"--config.init_from.keep='(\"{name}\",)'"
            )


def value_of(config: configs.Tree, leaf: str) -> Any:
    """The value of a leaf by its path."""
    return functools.reduce(operator.getitem, leaf.split("."), config)


def begun(
    state: TrainState, like: TrainState, settings: configs.Train
) -> tuple[TrainState, str]:
    """The first state of a run, with parameters of the run that `settings.init_from`
    names.

    It takes all leaves below `init_from.parts` that both runs have. Their shapes must
    agree, except those of positions, which are resized to the new grid. If only one of
    the runs applies its final norm to pooled tokens, that norm is not taken.

    Args:
        state: the first state with new parameters.
        like: shapes and shardings of the state.
        settings: the built config of the new run.
    Returns:
        The state, and a line for people: which leaves were taken, are new, or were not
        taken.
    Raises:
        ConfigError: the run or its checkpoint does not exist, or its parameters do not
            fit.
    """
    begin = settings.init_from
    folder = files.place(begin.run)
    saved = rundir.read_config(folder, f"config.init_from.run={begin.run!r}")
    wanted = ("params", "teacher") if begin.weights == "teacher" else ("params",)
    try:
        step, found = read_parts(folder, begin.step, wanted)
    except FileNotFoundError as error:
        raise configs.ConfigError(
            f"config.init_from.run={begin.run!r}: {error}"
        ) from error
    source = _flat(found["params"])
    if begin.weights == "teacher":
        if not found["teacher"]:
            raise configs.ConfigError(
                f"config.init_from.weights='teacher': {begin.run} has no teacher; want "
                "'trained'"
            )
        source |= _flat(found["teacher"])
    mesh = jax.tree.leaves(like.params)[0].sharding.mesh
    gather = jax.jit(states.unstack_blocks, out_shardings=sharding.replicated(mesh))
    with hosts.deadline("all hosts to gather the parameters"):
        fresh = _flat(jax.device_get(gather(state.params)))
    if _POSITIONS in fresh:
        source[_POSITIONS] = _positions(source, saved, settings)
    elif _POSITIONS in source and _below(_POSITIONS, begin.parts):
        raise configs.ConfigError(
            f"config.objective.encoder.positions='fixed': {begin.run} has learned "
            "ones; want 'learned'"
        )
    merged, account = _merge(fresh, source, _left(saved, settings), begin)
    layout = functools.partial(states.layout, scan=settings.scan)
    placed = jax.tree.map(lambda leaf: leaf.sharding, (like.params, like.teacher))
    params = jax.jit(layout, out_shardings=placed[0])(_nested(merged))
    teacher = jax.jit(
        lambda params: settings.objective.teacher(None, params, jnp.int32(0)),
        out_shardings=placed[1],
    )(params)
    account = f"began with  {begin.run}, step {step}: {account}"
    return dataclasses.replace(state, params=params, teacher=teacher), account


def _merge(
    fresh: dict[str, Any],
    source: dict[str, Any],
    left: tuple[str, ...],
    begin: configs.InitFrom,
) -> tuple[dict[str, Any], str]:
    """The leaves of `fresh`, those below `begin.parts` replaced from `source`; and a
    line for people.

    Args:
        left: paths that are never taken from `source`.
    """
    offered = {
        name: leaf
        for name, leaf in source.items()
        if _below(name, begin.parts) and not _below(name, left)
    }
    taken = fresh.keys() & offered.keys()
    if not taken:
        raise configs.ConfigError(
            f"config.init_from.parts={begin.parts}: {begin.run} has "
            f"{', '.join(_tops(source))} and this run {', '.join(_tops(fresh))}: want "
            "a part of both"
        )
    for name in sorted(taken):
        if np.shape(offered[name]) != np.shape(fresh[name]):
            raise configs.ConfigError(
                f"config.init_from.run={begin.run!r}: {name} is "
                f"{list(np.shape(offered[name]))} there and "
                f"{list(np.shape(fresh[name]))} here: want the same, or leave it out "
                "of config.init_from.parts"
            )
    merged = fresh | {name: np.asarray(offered[name]) for name in taken}
    new, unused = fresh.keys() - taken, source.keys() - taken
    apart = new & unused
    account = (
        f"{len(taken)} parameters taken; new: {_short(new - apart)}; not taken: "
        f"{_short(unused - apart)}"
    )
    if apart:
        account += f"; in both, but made anew: {_short(apart)}"
    return merged, account


def _positions(
    source: dict[str, Any], saved: configs.Tree, settings: configs.Train
) -> np.ndarray:
    """The other run's positions for this run's grid; the class token's come first."""
    patch = saved.objective.encoder.patch
    rows, cols = saved.data.image_size
    old = Grid(rows // patch, cols // patch, patch)
    new = settings.objective.grid(settings.data.image_shape)
    width = saved.objective.encoder.width
    table = np.concatenate([np.zeros((1, width)), sincos_2d(old, width)])
    table = np.asarray(source.get(_POSITIONS, table.astype(np.float32)))
    if old[:2] == new[:2]:
        return table
    return np.concatenate([table[:1], resized(table[1:], old[:2], new[:2])])


def _left(saved: configs.Tree, settings: configs.Train) -> tuple[str, ...]:
    """Paths that exist in both networks but with different purposes."""
    same = saved.objective.encoder.norm == settings.objective.encoder.norm
    return () if same else (_NORM,)


def _below(name: str, parts: tuple[str, ...]) -> bool:
    return any(name == part or name.startswith(f"{part}/") for part in parts)


def _flat(tree: Any) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep="/")


def _nested(leaves: dict[str, Any]) -> Any:
    return traverse_util.unflatten_dict(leaves, sep="/")


def _tops(leaves: dict[str, Any]) -> list[str]:
    return sorted({name.split("/")[0] for name in leaves})


def _short(names: Any) -> str:
    """The first two parts of the leaves' paths, each with the number of leaves below
    it."""
    counts: dict[str, int] = {}
    for name in sorted(names):
        top = "/".join(name.split("/")[:2])
        counts[top] = counts.get(top, 0) + 1
    return ", ".join(f"{top} ({n})" for top, n in counts.items()) or "none"
