# SPDX-License-Identifier: Apache-2.0
"""Job "eval": one measurement of a training run."""

import functools
import pathlib

import jax

from mim_jax import config as configs
from mim_jax import rundir, state
from mim_jax.checkpoint import read_params
from mim_jax.data.pipeline import EvalPasses
from mim_jax.evals.base import Run


def run(config: configs.Tree, workdir: pathlib.Path) -> None:
    """Measure `config.run` as `config.eval` says; results go to workdir/report.

    Raises:
        ConfigError: the config cannot work, or there is no such run or checkpoint.
    """
    settings = configs.build(config)
    name = config.eval.name
    trained, training = load(settings.run, settings.step)
    try:
        settings.eval.check(trained.objective)
    except ValueError as error:
        raise configs.ConfigError(f"config.eval: {error}") from error
    with rundir.claim(workdir):
        (workdir / "config.json").write_text(configs.dumps(config))
        report = settings.eval.measure(trained, EvalPasses(training.data))
        report.save(workdir / "report", name)


def load(
    folder: str | pathlib.Path, step: int | None = None
) -> tuple[Run, configs.Train]:
    """A trained run and its built config, from its directory.

    Args:
        step: which checkpoint; None is the newest.
    Raises:
        ConfigError: no run there, or no such checkpoint.
    """
    folder = pathlib.Path(folder)
    if not (folder / "config.json").exists():
        raise configs.ConfigError(
            f"run={str(folder)!r}: no config.json there; want the work directory of a "
            "training run"
        )
    training = configs.build(configs.load(folder / "config.json"))
    try:
        step, params = read_params(folder, step)
    except FileNotFoundError as error:
        raise configs.ConfigError(f"run={str(folder)!r}: {error}") from error
    initial = jax.jit(
        functools.partial(
            state.initial,
            training.objective,
            seed=training.seed,
            image_shape=training.data.image_shape,
        )
    )()[0]
    run = Run(
        objective=training.objective,
        params=params,
        initial=initial,
        step=step,
        name=folder.resolve().name,
    )
    return run, training
