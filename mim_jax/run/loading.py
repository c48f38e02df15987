# SPDX-License-Identifier: Apache-2.0
"""Loads trained runs from their directories, and measures them."""

import contextlib
import copy
import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

import jax

from mim_jax import config as configs
from mim_jax import state as states
from mim_jax.data.passes import EvalPasses
from mim_jax.evals.base import Eval, Run, caption, measured
from mim_jax.evals.report import Report
from mim_jax.objectives.base import Objective
from mim_jax.plan import for_evaluation
from mim_jax.run import files, rundir
from mim_jax.run.parts import read_parts


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A loaded run, ready to be measured.

    Attributes:
        folder: the run directory.
        run: the objective and parameters that evaluations read.
        training: the run's own config, built.
    """

    folder: files.Place
    run: Run
    training: configs.Train

    @property
    def passes(self) -> EvalPasses:
        """Passes over the images of the run's own config."""
        return EvalPasses(self.training.data)

    def untrained(self, name: str) -> "Loaded":
        """The same model with its parameters before training, called `name`."""
        run = dataclasses.replace(self.run, params=self.run.initial, name=name, step=0)
        return dataclasses.replace(self, run=run)


def load(
    folder: str | files.Place,
    step: int | None = None,
    teacher: bool = False,
    source: configs.Tree | None = None,
) -> tuple[Run, configs.Train]:
    """A trained run and its built config, from its run directory.

    Args:
        folder: run directory.
        step: step of the checkpoint; None: the newest.
        teacher: replace the student's parameters by the teacher's, as far as the
            teacher has them.
        source: the node of another source, whose images are read instead of the run's.
    Raises:
        ConfigError: the folder holds no run, the checkpoint does not exist, the run has
            no teacher, or the source has other channels than the run.

    Example:
        >>> run, training = load("runs/mae")
        mae, step 10: attention: encoder keep, decoder keep
        >>> run.step, training.batch_size
        (10, 16)
    """
    folder = files.place(folder)
    config = rundir.read_config(folder, f"run={str(folder)!r}")
    if source is not None:
        with config.data.unlocked():
            config.data.source = copy.deepcopy(source)
    training = configs.build(config)
    if source is not None:
        _tell(folder, training)
    parts = ("params", "stats", "memory")
    step, found = read_trained(folder, config, step, parts, teacher)
    shape = training.data.image_shape
    objective, forms = for_evaluation(training.objective, training.attention, shape)
    print(f"{files.absolute(folder).name}, step {step}: {forms}", flush=True)
    run = Run(
        objective=objective,
        params=found["params"],
        stats=found["stats"],
        memory=found["memory"] if jax.tree.leaves(found["memory"]) else None,
        initial=initial_params(config, training.objective),
        step=step,
        name=files.absolute(folder).name + (", teacher" if teacher else ""),
    )
    return run, training


def _tell(folder: files.Place, training: configs.Train) -> None:
    """Says what another source changes, and what stays the run's.

    Raises:
        ConfigError: its images have other channels.
    """
    data, want = training.data, len(training.objective.mean)
    if data.source.channels != want:
        raise configs.ConfigError(
            f"config.data.source has images of {data.source.channels} channel(s), and "
            f"{folder} learned from those of {want}: want the same, by a leaf "
            "data.source.channels where the source has one"
        )
    rows, cols = data.image_size
    name = files.absolute(folder).name
    print(
        f"{name}: images of config.data.source; from the run: size "
        f"{rows} x {cols}, crop of {data.eval_crop_fraction}, mean and deviation",
        flush=True,
    )


def read_trained(
    folder: files.Place,
    config: configs.Tree,
    step: int | None,
    parts: tuple[str, ...],
    teacher: bool,
) -> tuple[int, dict[str, Any]]:
    """(step, {part: tree}) of a run's checkpoint; blocks are stacked if its config says
    `scan`.

    Args:
        folder: run directory.
        config: the config saved there.
        step: step of the checkpoint; None: the newest.
        parts: fields of TrainState.
        teacher: replace the student's parameters by the teacher's, as far as the
            teacher has them.
    Raises:
        ConfigError: the checkpoint does not exist, or the run has no teacher.
        CheckpointError: the checkpoint is damaged.
    """
    read = (*parts, "teacher") if teacher else parts
    try:
        step, found = read_parts(folder, step, read)
    except FileNotFoundError as error:
        raise configs.ConfigError(f"run={str(folder)!r}: {error}") from error
    if teacher:
        if not found["teacher"]:
            raise configs.ConfigError(
                f"weights='teacher': run {str(folder)!r} has none; want 'trained'"
            )
        found["params"] |= found["teacher"]
    # Blocks stay stacked: a program of many deep networks compiles slowly without.
    return step, {part: states.layout(found[part], config.scan) for part in parts}


def initial_params(config: configs.Tree, objective: Objective) -> Any:
    """New parameters by the run's seed; blocks are stacked if its config says `scan`.

    Training started from these, unless `config.init_from` named another run.
    """
    shape = (*config.data.image_size, len(objective.mean))

    def make():
        params, _ = states.initial(objective, seed=config.seed, image_shape=shape)
        return states.layout(params, config.scan)

    return jax.jit(make)()


def load_all(
    folders: Iterable[str],
    step: int | None = None,
    weights: Literal["trained", "teacher", "initial"] = "trained",
    source: configs.Tree | None = None,
) -> dict[str, Loaded]:
    """Loads several runs that read the same images: {caption: run}.

    Args:
        folders: run directories.
        step: step of each run's checkpoint; None: the newest.
        weights: the trained parameters, the teacher's, or those before training.
        source: as for `load`.
    Raises:
        ConfigError: as `load`; or two runs have the same caption, or read different
            images.
    """
    found: dict[str, Loaded] = {}
    for folder in folders:
        run, training = load(folder, step, weights == "teacher", source)
        one = Loaded(files.place(folder), run, training)
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
    """Measure each run on the images of its own config.

    Returns:
        (reports, reasons), both by caption: a report for each run that could be
        measured, and for each other run the reason why not.
    Raises:
        ConfigError: the evaluation does not keep its promises.
    """
    reports, reasons = {}, {}
    for title, one in runs.items():
        try:
            check(evaluation, one)
            reports[title] = measured(evaluation, one.run, one.passes)
        except configs.ConfigError:
            raise
        except ValueError as error:
            reasons[title] = str(error)
    return reports, reasons


def check(evaluation: Eval, one: Loaded) -> None:
    """Raise, before measuring, if the evaluation cannot measure the run.

    Raises:
        ValueError: the objective or the data do not fit.
    """
    evaluation.check_objective(one.run.objective)
    evaluation.check_data(one.run.objective, one.passes)


def absent(evaluation: Eval, training: configs.Train) -> str:
    """Why the data of an evaluation are not there; "" if they are, or if it could not
    measure such an objective with any.

    Args:
        training: the built config of a run, which need not be trained yet.
    """
    with contextlib.suppress(ValueError):
        evaluation.check_objective(training.objective)
        try:
            evaluation.check_data(training.objective, EvalPasses(training.data))
        except (ValueError, OSError) as error:
            return str(error)
    return ""


def _check_same_images(one: Loaded, other: Loaded) -> None:
    """ConfigError unless two runs read images of the same source and size."""
    mine, theirs = one.training.data, other.training.data
    if (mine.image_shape, mine.source) != (theirs.image_shape, theirs.source):
        raise configs.ConfigError(
            f"{str(one.folder)!r} reads {mine.source} as {mine.image_shape}, another "
            f"run {theirs.source} as {theirs.image_shape}: want the same for all"
        )
