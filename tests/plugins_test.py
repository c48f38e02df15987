# SPDX-License-Identifier: Apache-2.0
"""Plug-ins from outside the package: imported by name, by the user alone."""

import json
import os
import pathlib
import subprocess
import sys

import environments
import pytest
from absl.testing import flagsaver
from tables import restored

from mim_jax import compare, config, evaluate, main, train
from mim_jax.config import ConfigError
from mim_jax.maskings.base import Masking
from mim_jax.run import commandline

ROOT = pathlib.Path(__file__).parents[1]

# One plug-in of each kind that a run needs, as a user's file in the working directory.
OUTSIDE = """
import dataclasses
import multiprocessing
import os
import pathlib

import jax.numpy as jnp
import numpy as np

from mim_jax import config
from mim_jax.data.sources.base import Source
from mim_jax.evals.knn import KNN
from mim_jax.maskings.base import Masking
from mim_jax.objectives.mae import MAE
from mim_jax.ops.masking import from_scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Top(Masking):
    rows: int = 1

    def visible_count(self, grid):
        return self.rows * grid.cols

    def __call__(self, keys, grid):
        order = jnp.arange(grid.size, dtype=jnp.int32)
        scores = jnp.broadcast_to(order, (len(keys), grid.size))
        return from_scores(scores, self.visible_count(grid))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise(Source):
    images: int = 32
    first: int = 0
    told: str = ""  # folder, in which each worker process leaves its number

    def __len__(self):
        return self.images

    def __getitem__(self, index):
        if self.told and multiprocessing.parent_process() is not None:
            pathlib.Path(self.told, f"worker{os.getpid()}").touch()
        rng = np.random.default_rng(self.first + index)
        image = rng.integers(0, 256, (8, 8, 1), dtype=np.uint8)
        return {"image": image, "label": index % 2}

    @property
    def classes(self):
        return ("even", "odd")

    @property
    def channels(self):
        return 1

    def held_out(self):
        return dataclasses.replace(self, first=self.images)

    def fingerprint(self):
        return {"name": "noise", "images": self.images, "first": self.first}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Neighbours(KNN):
    pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine(MAE):
    pass


config.register("top", Top)
config.register("noise", Noise)
config.register("neighbours", Neighbours)
config.register("mine", Mine)
"""
CHOICES = "masking=top,source=noise,eval=neighbours,objective=mine"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """A working directory with the user's module."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "outside.py").write_text(OUTSIDE)
    return folder


@pytest.fixture(scope="module")
def run(folder) -> pathlib.Path:
    """A run of two steps by the real command line, whose workers read the source."""
    leaves = {
        "steps": 2,
        "batch_size": 8,
        "objective.encoder.depth": 1,
        "data.workers": 1,
        "data.source.told": folder,
        "report.rows": 1,
        "report.neighbours": 1,
        "report.k": "(3,)",
        "compile_cache": "false",
    }
    command = [
        *(sys.executable, "-m", "mim_jax.main", "--plugins", "outside"),
        f"--config={ROOT}/configs/mae.py:digits,{CHOICES}",
        f"--workdir={folder / 'run'}",
        *(f"--config.{name}={value}" for name, value in leaves.items()),
    ]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        cwd=folder,
        env=environments.small(PYTHONPATH=path),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture
def searched(folder, monkeypatch):
    """The user's folder is searched; what a test imports and registers is undone."""
    modules = set(sys.modules)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    with restored():
        yield folder
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(f"{folder}/"):
            del sys.modules[name]


def message(function, *args) -> str:
    with pytest.raises(ConfigError) as caught:
        function(*args)
    return str(caught.value)


# A run with plug-ins from outside, and who reads it.


def test_a_run_trains_and_reports_with_plug_ins_from_outside(folder, run):
    saved = json.loads((run / "config.json").read_text())
    assert saved["plugins"] == ["outside"]
    assert saved["objective"]["name"] == "mine"
    assert saved["objective"]["masking"] == {"name": "top", "rows": 1}
    assert saved["data"]["source"]["name"] == "noise"
    assert "accuracy_model_k3" in json.loads(
        (run / "report" / "neighbours.json").read_text()
    )
    assert len(list(folder.glob("worker*"))) >= 1  # which unpickled the source


def resume(run, workdir):
    train.run(config.read(str(ROOT / "configs/mae.py:digits")), run)


def start_from(run, workdir):
    tree = config.read(str(ROOT / "configs/linear_probe.py:digits"))
    tree.init_from.run = str(run)
    train.run(tree, workdir)


def measure(run, workdir):
    tree = config.experiment("eval", eval="knn")
    tree.run = str(run)
    evaluate.run(tree, workdir)


def measure_several(run, workdir):
    tree = config.experiment("compare")
    tree.runs = (str(run),)
    compare.run(tree, workdir)


@pytest.mark.parametrize("job", [resume, start_from, measure, measure_several])
def test_a_run_directory_imports_nothing(run, searched, tmp_path, job):
    before = (run / "config.json").read_bytes()
    assert message(job, run, tmp_path / "new") == (
        f"{run}/config.json: config.plugins=('outside',): outside is not imported, and "
        "a config imports nothing itself; want --plugins=outside on the command line "
        "if you trust this code, or config.load_plugins in a program"
    )
    assert "outside" not in sys.modules
    assert (run / "config.json").read_bytes() == before
    assert not (tmp_path / "new").exists()


def test_a_run_is_read_where_its_module_is_imported(run, searched):
    assert config.load_plugins(["outside"]) == ("outside",)
    loaded, training = evaluate.load(run)
    outside = sys.modules["outside"]
    assert type(loaded.objective) is outside.Mine
    assert training.objective.masking == outside.Top()
    # Resuming with a further module changes nothing that is learned.
    tree = config.load(run / "config.json")
    more = tree.copy_and_resolve_references()
    more.plugins = ("outside", "json")
    assert config.difference(tree, more) == []


def test_a_config_says_which_of_its_modules_are_missing(searched, tmp_path):
    config.load_plugins(["outside"])
    tree = config.experiment("train", source="digits")
    tree.plugins = ("outside", "nowhere")
    expected = (
        "config.plugins=('outside', 'nowhere'): nowhere is not imported, and a config "
        "imports nothing itself; want --plugins=outside,nowhere on the command line"
    )
    assert message(config.build, tree).startswith(expected)
    path = tmp_path / "config.json"
    path.write_text(config.dumps(tree))
    assert message(config.load, path).startswith(f"{path}: {expected}")


@pytest.mark.parametrize(
    "value, expected",
    [
        ("outside", "config.plugins='outside': want tuple"),
        (["outside", 3], "config.plugins=3: want str"),
        ({"a": 1}, "config.plugins={'a': 1}: want tuple"),
        (None, "config.plugins=None: want tuple"),
        (["a\nb"], "config.plugins=('a\\nb',): 'a\\nb' is no module's name"),
        (["os; x"], "config.plugins=('os; x',): 'os; x' is no module's name"),
        ([""], "config.plugins=('',): '' is no module's name"),
    ],
)
def test_a_saved_list_of_modules_may_come_from_anybody(tmp_path, value, expected):
    values = json.loads(config.dumps(config.experiment("train", source="digits")))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values | {"plugins": value}))
    found = message(config.load, path)
    assert found.startswith(f"{path}: {expected}") and "\n" not in found


def test_a_config_of_an_older_version_has_no_modules(tmp_path):
    values = json.loads(config.dumps(config.experiment("train", source="digits")))
    del values["plugins"]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    assert config.load(path).plugins == ()


# Modules that cannot be imported.

BROKEN = {
    "raises": ("x = 1\nraise ValueError('two\\nlines')\n", ":2: ValueError: two lines"),
    "misspelt": ("x = 1\n\nx = = 2\n", ": SyntaxError: invalid syntax (misspelt.py, "),
    "needs": ("import nowhere\n", ":1: ModuleNotFoundError: No module named 'nowhere'"),
    "calls": ("def f():\n    1 / 0\n\n\nf()\n", ":5: ZeroDivisionError: division by"),
    "listed": (
        "import dataclasses\n\n\n@dataclasses.dataclass(frozen=True)\nclass A:\n"
        "    x: list = []\n",
        ":4: ValueError: mutable default <class 'list'> for field x is not allowed",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_module_that_fails_says_where(searched, name):
    text, expected = BROKEN[name]
    path = searched / f"{name}.py"
    path.write_text(text)
    found = message(config.load_plugins, [name])
    where = "" if name == "misspelt" else f" at {path}"
    assert found.startswith(f"--plugins={name}: importing it fails{where}{expected}")
    assert "\n" not in found and name not in sys.modules


def test_a_class_that_cannot_be_configured_is_named(searched):
    (searched / "unfit.py").write_text(
        "from mim_jax import config\nfrom mim_jax.maskings.base import Masking\n\n\n"
        "class Unfit(Masking):\n    every: int = 2\n\n\n"
        'config.register("unfit", Unfit)\n'
    )
    assert message(config.load_plugins, ["unfit"]).startswith(
        "--plugins=unfit: unfit.Unfit is no dataclass, so its fields every are none: "
    )
    assert "unfit" not in config.KINDS[Masking][1]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("nowhere", "there is no module 'nowhere'; Python does not search the working"),
        ("nowhere.at.all", "there is no module 'nowhere'; "),
        ("outside.inner", "there is no module 'outside.inner'; "),
        ("outside.py", "want the name of a module: --plugins=outside imports outside."),
        (
            "./outside",
            "want the name of a module: --plugins=outside imports outside.py",
        ),
        ("out-side", "want the name of a module: --plugins=my_module imports my_modul"),
        ("", "want the name of a module: --plugins=my_module imports my_module.py "),
        (".outside", "want the name of a module: "),
    ],
)
def test_a_module_that_is_not_there(searched, monkeypatch, tmp_path, name, expected):
    monkeypatch.chdir(tmp_path)
    found = message(config.load_plugins, [name])
    assert found.startswith(f"--plugins={name}: {expected}")


def test_the_working_directory_is_named(searched, monkeypatch):
    monkeypatch.chdir(searched)
    assert message(config.load_plugins, ["nowhere"]) == (
        "--plugins=nowhere: there is no module 'nowhere'; Python searches the working "
        f"directory, {searched}; PYTHONPATH adds other folders"
    )


def test_a_single_name_is_no_list(searched):
    expected = "load_plugins('outside'): want a list, ['outside']"
    assert message(config.load_plugins, "outside") == expected


# The command line.


class Left(Exception):
    pass


def parsed(monkeypatch, *arguments: str) -> config.Tree:
    """The config as a program gets it from these flags."""

    def leave(code):
        raise Left(code)

    argv = ["main", "--workdir=run", *arguments]
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(sys, "argv", argv)
    with flagsaver.flagsaver():
        main.parse(argv)
        return commandline.CONFIG.value


@pytest.mark.parametrize(
    "plugins", [["--plugins=outside"], ["-plugins", "outside"], ["--plugins=x,outside"]]
)
def test_the_command_line_imports_before_it_reads_the_config(
    searched, monkeypatch, plugins
):
    monkeypatch.chdir(ROOT)
    (searched / "x.py").write_text("")
    tree = parsed(
        monkeypatch,
        *("--config", f"configs/mae.py:digits,{CHOICES}"),
        "--config.objective.masking.rows=2",
        *plugins,
    )
    assert tree.plugins == tuple(plugins[-1].removeprefix("--plugins=").split(","))
    built = config.build(tree)
    assert built.objective.masking == sys.modules["outside"].Top(rows=2)
    assert type(built.report) is sys.modules["outside"].Neighbours


def test_a_config_file_may_import_modules_itself(searched, monkeypatch):
    (searched / "mine.py").write_text(
        "from mim_jax import config\n\n\ndef get_config():\n"
        '    plugins = config.load_plugins(["outside"])\n'
        '    c = config.experiment("train", source="noise")\n'
        "    c.plugins = plugins\n    return c\n"
    )
    (searched / "other.py").write_text("")
    config_file = f"--config={searched}/mine.py"
    tree = parsed(monkeypatch, config_file, "--plugins=other,outside")
    assert tree.plugins == ("outside", "other")


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--plugins=nowhere"], "error: --plugins=nowhere: there is no module 'nowhe"),
        (["--plugins=mine.py"], "error: --plugins=mine.py: want the name of a module"),
        (
            ["--config.plugins=('os',)"],
            "error: config.plugins records what --plugins=MODULE imports: want that fl",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
    monkeypatch, capfd, arguments, expected
):
    monkeypatch.chdir(ROOT)
    with pytest.raises(Left, match="2"):
        parsed(monkeypatch, "--config=configs/mae.py:digits", *arguments)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(expected)


def test_a_name_from_outside_is_unknown_without_its_module(monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    with pytest.raises(Left, match="2"):
        parsed(monkeypatch, "--config=configs/mae.py:digits,masking=top")
    (line,) = capfd.readouterr().err.splitlines()
    known = ", ".join(sorted(config.KINDS[Masking][1]))
    assert line.startswith("error: masking 'top' is unknown")
    assert line.endswith(f"known: {known}; --plugins=MODULE adds yours")
