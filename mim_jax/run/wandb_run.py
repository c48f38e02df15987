# SPDX-License-Identifier: Apache-2.0
"""Sends what a run logs to Weights & Biases, which may fail without harm."""

import importlib
import json
import secrets
import sys
import threading
from collections.abc import Callable
from typing import Any

from mim_jax.run import files
from mim_jax.schema import ConfigError, to_json

_PATIENCE = 10.0  # seconds to wait for what is still on its way when the run ends


def check_wandb(project: str) -> None:
    """Raise, before anything compiles, if a run that logs to `project` could not.

    Raises:
        ConfigError: the package is not installed.
    """
    if project:
        _package(project)


class Wandb:
    """A run of Weights & Biases. If the service fails, a warning says so, and training
    goes on without it.

    The run directory keeps the id in wandb.json, so that a resumed run goes on there.
    A row may come twice, since a resumed run repeats the steps after its checkpoint:
    the field `step` is the axis of all curves, not the number of the row.

    Args:
        workdir: directory of the run; its config.json is shown there.
        project: name of the project.
    """

    def __init__(self, workdir: files.Place, project: str):
        self._wandb, self._run = _package(project), None
        self._scratch = files.scratch(workdir)
        self._folder = self._scratch / "wandb"
        self._try(lambda: self._begin(workdir, project))

    def log(
        self,
        step: int,
        values: dict[str, float | None],
        pictures: dict[str, files.Place],
    ) -> None:
        """Send one row.

        Args:
            values: None where a number is not finite.
            pictures: PNG files by name.
        """
        run = self._run
        if run is None:
            return

        def send():
            row: dict[str, Any] = {k: v for k, v in values.items() if v is not None}
            row |= {k: self._picture(path) for k, path in pictures.items()}
            run.log({"step": step, **row})

        self._try(send)

    def close(self) -> None:
        """Send what is left, for some seconds at most: a run that was asked to leave
        has no more. What was not sent stays in the run directory."""
        run, self._run = self._run, None
        if run is None:
            return
        thread = threading.Thread(
            target=lambda: self._try(run.finish), name="wandb", daemon=True
        )
        thread.start()
        thread.join(_PATIENCE)
        if thread.is_alive():
            _warn(f"not all is sent; `wandb sync` sends what lies in {self._folder}")

    def _picture(self, path: files.Place) -> Any:
        return self._wandb.Image(str(files.here(path, self._scratch)))

    def _begin(self, workdir: files.Place, project: str) -> None:
        path, about = workdir / "wandb.json", {}
        if files.exists(path):
            about = json.loads(files.read(path))
        if about.get("project") != project:
            about = {"project": project, "id": secrets.token_hex(4)}
            files.write(path, to_json(about) + "\n")
        config = workdir / "config.json"
        run = self._wandb.init(
            project=project,
            id=about["id"],
            name=files.absolute(workdir).name,
            dir=str(self._scratch),
            config=json.loads(files.read(config)) if files.exists(config) else {},
            allow_val_change=True,  # of leaves that a resumed run may change
            resume="allow",
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        self._run = run

    def _try(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except Exception as error:  # of the service, the network, the disk
            self._run = None
            lines = str(error).splitlines() or [type(error).__name__]
            _warn(f"{lines[0]}; the run goes on without it")


def _package(project: str) -> Any:
    """The package, imported only by runs that log there."""
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ConfigError(
            f"config.log.wandb={project!r} needs a package that is not installed "
            f"({error}): want pip install 'mim_jax[wandb]', or config.log.wandb=''"
        ) from error


def _warn(text: str) -> None:
    print(f"WARNING: Weights & Biases: {text}", file=sys.stderr, flush=True)
