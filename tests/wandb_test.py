# SPDX-License-Identifier: Apache-2.0
"""Weights & Biases, by a stand-in for its package: what it is told, and that its
failures stop nothing."""

import dataclasses
import importlib
import json
import sys
import time
import types

import pytest

from mim_jax import config
from mim_jax.run import wandb_run
from mim_jax.run.log import Log, Writer


@dataclasses.dataclass
class Service:
    """What a run told the service, which fails at `broken`."""

    broken: str = ""
    slow: float = 0.0
    inits: list[dict] = dataclasses.field(default_factory=list)
    rows: list[dict] = dataclasses.field(default_factory=list)
    axes: list[tuple] = dataclasses.field(default_factory=list)
    finished: int = 0

    def _come(self, name):
        if name == self.broken:
            raise ConnectionError("no route to host\nand a long story")

    def init(self, **given):
        self._come("init")
        self.inits.append(given)
        return self

    def define_metric(self, name, step_metric=None):
        self.axes.append((name, step_metric))

    def log(self, row):
        self._come("log")
        self.rows.append(row)

    def finish(self):
        time.sleep(self.slow)
        self._come("finish")
        self.finished += 1


@pytest.fixture
def service(monkeypatch):
    module, found = types.ModuleType("wandb"), Service()
    module.init, module.Image = found.init, lambda path: ("image", path)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return found


def write(workdir, steps, start=0, **pictures):
    writer = Writer(workdir, Log(tensorboard=False, wandb="trial"), start)
    for step in steps:
        writer.write(step, {"loss": 1 / step, "odd": float("nan")}, pictures)
    writer.close()


def test_rows_go_to_one_run_of_the_project_also_after_a_resume(tmp_path, service):
    (tmp_path / "config.json").write_text('{"steps": 3}')
    write(tmp_path, [1, 2])
    picture = tmp_path / "knn.png"
    write(tmp_path, [2, 3], start=1, **{"knn/knn": picture})
    first, second = service.inits
    assert first["project"] == "trial" and first["config"] == {"steps": 3}
    assert first["id"] == second["id"] and second["resume"] == "allow"
    assert first["name"] == tmp_path.name and first["dir"] == str(tmp_path)
    assert ("*", "step") in service.axes
    shown = ("image", str(picture))
    assert service.rows == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 0.5},
        {"step": 2, "loss": 0.5, "knn/knn": shown},
        {"step": 3, "loss": 1 / 3, "knn/knn": shown},
    ]
    assert service.finished == 2


def test_another_project_or_directory_is_another_run(tmp_path, service):
    for name, project in (("a", "one"), ("a", "two"), ("b", "two")):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        wandb_run.Wandb(folder, project).close()
    assert len({given["id"] for given in service.inits}) == 3


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_service_that_fails_stops_nothing_and_is_told_once(
    tmp_path, service, capsys, broken
):
    service.broken = broken
    write(tmp_path, [1, 2, 3])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert capsys.readouterr().err == (
        "WARNING: Weights & Biases: no route to host; the run goes on without it\n"
    )
    assert len(service.rows) == (3 if broken == "finish" else 0)


def test_a_slow_service_does_not_hold_a_run_that_leaves(
    tmp_path, service, capsys, monkeypatch
):
    service.slow = 3.0
    monkeypatch.setattr(wandb_run, "_PATIENCE", 0.05)
    begun = time.monotonic()
    write(tmp_path, [1])
    assert time.monotonic() - begun < 2
    assert "`wandb sync` sends what lies in" in capsys.readouterr().err


def test_a_missing_package_is_refused_with_the_extra_that_has_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    wandb_run.check_wandb("")
    with pytest.raises(config.ConfigError) as caught:
        wandb_run.check_wandb("trial")
    message = str(caught.value)
    assert "config.log.wandb='trial'" in message and "mim_jax[wandb]" in message


def test_it_is_imported_only_by_runs_that_log_there(tmp_path, monkeypatch):
    asked = []
    find = importlib.import_module
    monkeypatch.setattr(
        importlib, "import_module", lambda name: asked.append(name) or find(name)
    )
    Writer(tmp_path, Log(tensorboard=False), 0).close()
    assert "wandb" not in asked and not (tmp_path / "wandb.json").exists()
