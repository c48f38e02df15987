# SPDX-License-Identifier: Apache-2.0
"""Trained runs, read from their directories, and their measurement."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable
from typing import Literal

import jax

from mim_jax import config as configs
from mim_jax import state
from mim_jax.data.passes import EvalPasses
from mim_jax.evals.base import Eval, Run, caption
from mim_jax.evals.report import Report
from mim_jax.plan import for_evaluation
from mim_jax.run.checkpoint import read_parts


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A run that is ready to be measured.

    Attributes:
        folder: its run directory.
        run: what evaluations read.
        training: its own config, built.
    """

    folder: pathlib.Path
    run: Run
    training: configs.Train

    @property
    def passes(self) -> EvalPasses:
        """Passes over the images of the run's own config."""
        return EvalPasses(self.training.data)

    def untrained(self, name: str) -> "Loaded":
        """The model before training, under another name."""
        run = dataclasses.replace(self.run, params=self.run.initial, name=name, step=0)
        return dataclasses.replace(self, run=run)


def load(
    folder: str | pathlib.Path, step: int | None = None, teacher: bool = False
) -> tuple[Run, configs.Train]:
    """A trained run and its built config, from its run directory.

    Args:
        step: which checkpoint; None is the newest.
        teacher: replace the student's parameters by the teacher's, where it has them.
    Raises:
        ConfigError: there is no run, or no such checkpoint, or it has no teacher.

    Example:
        >>> run, training = load("runs/mae")  # doctest: +SKIP
        >>> features = run.objective.features(run.params, images)  # doctest: +SKIP
    """
    folder = pathlib.Path(folder)
    if not (folder / "config.json").exists():
        raise configs.ConfigError(
            f"run={str(folder)!r}: no config.json there; want the work directory of a "
            "training run"
        )
    training = configs.build(configs.load(folder / "config.json"))
    parts = ["params", "stats", "memory"] + ["teacher"] * teacher
    try:
        step, found = read_parts(folder, step, tuple(parts))
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
    # In the layout of training: unstacked, many deep networks compile slowly.
    laid = functools.partial(state.layout, scan=training.scan)
    objective, forms = for_evaluation(training)
    print(f"{folder.resolve().name}, step {step}: {forms}", flush=True)
    run = Run(
        objective=objective,
        params=laid(found["params"] | (found["teacher"] if teacher else {})),
        stats=laid(found["stats"]),
        memory=laid(found["memory"]) or None,
        initial=jax.jit(lambda: laid(make()[0]))(),
        step=step,
        name=folder.resolve().name + (", teacher" if teacher else ""),
    )
    return run, training


def load_all(
    folders: Iterable[str],
    step: int | None = None,
    weights: Literal["trained", "teacher", "initial"] = "trained",
) -> dict[str, Loaded]:
    """Several runs on the same images, by their captions.

    Args:
        step: which checkpoint of each; None is the newest.
        weights: the trained parameters, the teacher's, or those before training.
    Raises:
        ConfigError: as `load`; or two runs have the same caption or read other images.
    """
    found: dict[str, Loaded] = {}
    for folder in folders:
        run, training = load(folder, step, teacher=weights == "teacher")
        one = Loaded(pathlib.Path(folder), run, training)
        if weights == "initial":
            one = one.untrained(f"{run.name}, random")
        for other in found.values():
            _check_same_images(one, other)
        title = caption(one.run)
        if title in found:
            raise configs.ConfigError(
                f"run {str(folder)!r} is called {title!r} like another run: want "
                "folders with different names"
            )
        found[title] = one
    return found


def measure(
    evaluation: Eval, runs: dict[str, Loaded]
) -> tuple[dict[str, Report], dict[str, str]]:
    """Measure runs by their captions, each on the images of its own config.

    Returns:
        (reports, reasons): of the runs that can be measured, and of those that cannot.
    """
    reports, reasons = {}, {}
    for title, one in runs.items():
        try:
            check(evaluation, one)
            reports[title] = evaluation.measure(one.run, one.passes)
        except ValueError as error:
            reasons[title] = str(error)
    return reports, reasons


def check(evaluation: Eval, one: Loaded) -> None:
    """Refuse, before measuring, a run that the evaluation cannot measure.

    Raises:
        ValueError: the objective or the data do not fit.
    """
    evaluation.check_objective(one.run.objective)
    evaluation.check_data(one.run.objective, one.passes)


def _check_same_images(one: Loaded, other: Loaded) -> None:
    """ConfigError unless two runs read images of the same source and size."""
    mine, theirs = one.training.data, other.training.data
    if (mine.image_shape, mine.source) != (theirs.image_shape, theirs.source):
        raise configs.ConfigError(
            f"{str(one.folder)!r} reads {mine.source} as {mine.image_shape}, another "
            f"run {theirs.source} as {theirs.image_shape}: want the same for all"
        )
