# SPDX-License-Identifier: Apache-2.0
"""Job "eval": one measurement of one or several training runs."""

import dataclasses
import functools
import hashlib
import json
import pathlib
from typing import Any

import jax
import numpy as np

import mim_jax
from mim_jax import config as configs
from mim_jax import state
from mim_jax.data.pipeline import EvalPasses
from mim_jax.evals.base import Run, caption, save
from mim_jax.run import rundir
from mim_jax.run.parts import read_parts
from mim_jax.sharding import path_name


def run(config: configs.Tree, workdir: pathlib.Path) -> None:
    """Measure the runs of `config` as `config.eval` says.

    Pictures and plain values go to workdir/report, values with units, counts and
    confidence intervals to workdir/results.json.

    Raises:
        ConfigError: the config cannot work, or there is no such run or checkpoint.
    """
    settings = configs.build(config)
    name = config.eval.name
    found, about = {}, {}
    for folder in (settings.run, *settings.also):
        teacher = settings.weights == "teacher"
        trained, training = load(folder, settings.step, teacher)
        try:
            settings.eval.check_objective(trained.objective)
            settings.eval.check_data(trained.objective, EvalPasses(training.data))
        except ValueError as error:
            raise configs.ConfigError(f"config.eval: {error}") from error
        if settings.weights == "initial":
            trained = dataclasses.replace(
                trained, params=trained.initial, name=f"{trained.name}, random", step=0
            )
        check_alike(folder, training, [one for _, one in found.values()])
        title = caption(trained)
        if title in about:
            raise configs.ConfigError(
                f"also={folder!r} is called {title!r} like another run: want folders "
                "with different names"
            )
        about[title] = {
            "run": str(folder),
            "step": trained.step,
            "weights": settings.weights,
            "parameters_sha256": _digest(state.unstack_blocks(trained.params)),
        }
        found[title] = trained, training
    with rundir.claim(workdir):
        (workdir / "config.json").write_text(configs.dumps(config))
        try:
            reports = {
                title: settings.eval.measure(trained, EvalPasses(training.data))
                for title, (trained, training) in found.items()
            }
        except ValueError as error:  # what only the data can tell
            raise configs.ConfigError(f"config.eval: {error}") from error
        for title, report in reports.items():
            about[title]["results"] = {
                key: number._asdict() for key, number in report.numbers.items()
            }
        results = {
            "eval": name,
            "version": mim_jax.__version__,
            "runs": about,
            "config": json.loads(configs.dumps(config)),
        }
        (workdir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        save(workdir / "report", name, reports, settings.eval.draw(reports))


def check_alike(
    folder: str, training: configs.Train, others: list[configs.Train]
) -> None:
    """Refuses a run that does not read the images of the others.

    Raises:
        ConfigError: source or size are not the same.
    """
    data = training.data
    for other in others:
        first = other.data
        if (data.image_shape, data.source) != (first.image_shape, first.source):
            raise configs.ConfigError(
                f"{folder!r} reads {data.source} as {data.image_shape}, another run "
                f"{first.source} as {first.image_shape}: want the same for all"
            )


def _digest(params: Any) -> str:
    """SHA-256 over names, shapes and bytes of all parameters."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        leaf = np.asarray(leaf)
        digest.update(f"{path_name(path)} {leaf.dtype} {leaf.shape} ".encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()


def load(
    folder: str | pathlib.Path, step: int | None = None, teacher: bool = False
) -> tuple[Run, configs.Train]:
    """A trained run and its built config, from its directory.

    Args:
        step: which checkpoint; None is the newest.
        teacher: take the teacher's parameters, where it has them, for the student's.
    Raises:
        ConfigError: no run there, or no such checkpoint, or it has no teacher.
    """
    folder = pathlib.Path(folder)
    if not (folder / "config.json").exists():
        raise configs.ConfigError(
            f"run={str(folder)!r}: no config.json there; want the work directory of a "
            "training run"
        )
    training = configs.build(configs.load(folder / "config.json"))
    try:
        parts = ("params", "stats", *(["teacher"] if teacher else []))
        step, found = read_parts(folder, step, parts)
    except FileNotFoundError as error:
        raise configs.ConfigError(f"run={str(folder)!r}: {error}") from error
    if teacher and not found["teacher"]:
        raise configs.ConfigError(
            f"weights='teacher': run {str(folder)!r} has none; want 'trained'"
        )
    make = functools.partial(
        state.initial,
        training.objective,
        seed=training.seed,
        image_shape=training.data.image_shape,
    )
    # As it was trained: many deep networks in one evaluation compile slowly.
    laid = functools.partial(state.layout, scan=training.scan)
    run = Run(
        objective=training.objective,
        params=laid(found["params"] | (found["teacher"] if teacher else {})),
        stats=laid(found["stats"]),
        initial=jax.jit(lambda: laid(make()[0]))(),
        step=step,
        name=folder.resolve().name + (", teacher" if teacher else ""),
    )
    return run, training
