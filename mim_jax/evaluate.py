# SPDX-License-Identifier: Apache-2.0
"""Job "eval": one evaluation of one or several trained runs."""

import hashlib
import json
from typing import Any

import jax
import numpy as np

import mim_jax
from mim_jax import config as configs
from mim_jax import state
from mim_jax.evals.base import drawn
from mim_jax.evals.report import save
from mim_jax.run import files, loading, notes, rundir
from mim_jax.run.loading import load
from mim_jax.schema import to_json
from mim_jax.sharding import path_name

__all__ = ["load", "run"]


def run(config: configs.Tree, workdir: files.Place) -> None:
    """Measure the runs of `config` by the evaluation of `config.eval`.

    Writes pictures, plain values and arrays to workdir/report, and values with units,
    counts and confidence intervals to workdir/results.json.

    Raises:
        ConfigError: the config cannot work, or there is no such run or checkpoint.
    """
    settings = configs.build(config)
    evaluation, name = settings.eval, config.eval.name
    folders = (settings.run, *settings.also)
    images = config.data.source
    runs = loading.load_all(folders, settings.step, settings.weights, images)
    try:
        for one in runs.values():
            loading.check(evaluation, one)
    except ValueError as error:
        raise configs.ConfigError(f"config.eval: {error}") from error
    with rundir.claim(workdir, "eval"):
        rundir.write_config(workdir, config)
        lines = [f"eval        {name}"]
        lines += [f"of          {title}: {one.folder}" for title, one in runs.items()]
        notes.begin(workdir, "\n".join(lines))
        reports, reasons = loading.measure(evaluation, runs)
        if reasons:
            raise configs.ConfigError(f"config.eval: {next(iter(reasons.values()))}")
        about = {
            title: {
                "run": str(one.folder),
                "step": one.run.step,
                "weights": settings.weights,
                "parameters_sha256": _digest(state.unstack_blocks(one.run.params)),
                "results": reports[title].described,
            }
            for title, one in runs.items()
        }
        results = {
            "eval": name,
            "version": mim_jax.__version__,
            "runs": about,
            "config": json.loads(configs.dumps(config)),
        }
        files.write(workdir / "results.json", to_json(results, indent=2) + "\n")
        save(workdir / "report", name, reports, drawn(evaluation, reports))
        notes.end(
            workdir,
            "\n".join(
                f"{title}: {key} {value:.6g}"
                for title, report in reports.items()
                for key, value in report.scalars.items()
            )
            + "\nreport/ has pictures and numbers",
        )


def _digest(params: Any) -> str:
    """SHA-256 over names, shapes and bytes of all parameters."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        leaf = np.asarray(leaf)
        digest.update(f"{path_name(path)} {leaf.dtype} {leaf.shape} ".encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()
