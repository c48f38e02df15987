# SPDX-License-Identifier: Apache-2.0
"""The house rules that protect users: who imports whom, and what nobody does."""

import ast
import functools
import importlib
import pathlib
import re
import socket
import subprocess
import sys
import tomllib

import pytest

from mim_jax import config

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "mim_jax"
CODE = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "configs").glob("*.py")])
ALL = sorted([*CODE, *(ROOT / "tests").rglob("*.py"), *ROOT.glob("benchmarks/*.py")])

# Module or room: the project modules and rooms that it may import, besides
# mim_jax itself (the version). The longest name that fits a module decides.
MAY_IMPORT = {
    "ops": ("ops",),
    "kernels": ("kernels", "ops"),
    "models": ("kernels", "models", "ops"),
    "maskings": ("maskings.base", "ops"),
    "tokenizers": ("tokenizers.base", "ops"),
    "objectives": (
        *("objectives.base", "objectives.t2", "maskings", "models", "ops"),
        "tokenizers",
    ),
    "evals": (
        *("evals.base", "evals.report", "evals.figures", "evals.images", "run.files"),
        *("evals.features", "evals.logits", "evals.occluded"),
        *("maskings.random", "objectives.base", "models", "ops"),
    ),
    # Theorem 1 as code: importable without the rest.
    "theory": ("theory",),
    # ... but for the curves of the masks that training draws.
    "theory.curves": ("maskings", "ops.patches", "theory"),
    "data.fields": (),
    "data.decoding": (),
    "data.transforms": (),
    "data.randaugment": (),
    "data.sources": ("data.sources.base", "data.sources.packaged", "data.fields"),
    "data.sources.drawings": ("theory.grammar",),
    "data.segments": (),
    # Objects in images: digits of MNIST and drawn shapes over the photographs.
    "data.sources.scenes": (
        *("data.sources.base", "data.sources.mnist", "data.sources.photos"),
        "data.segments",
    ),
    "data.sources.coco": ("data.sources.base", "data.segments"),
    "data.examples.instances": (
        *("data.examples.base", "data.decoding", "data.fields", "data.geometry"),
        *("data.segments", "data.transforms"),
    ),
    "data.coco": ("data.decoding", "data.segments", "data.sources"),
    "data.sources.hierarchy": (
        *("data.sources.base", "data.sources.drawings", "data.fields"),
        *("theory.grammar", "theory.trees"),
    ),
    "data.geometry": ("data.randaugment", "data.sources.base", "data.transforms"),
    "data.examples": (
        *("data.examples.base", "data.decoding", "data.fields", "data.geometry"),
    ),
    "data.sets": ("data.sets.base", "data.sources"),
    "data.sets.shifts": ("data.decoding", "data.sets.base", "data.sources"),
    # ObjectNet and the cue conflicts have the classes of ImageNet.
    "data.sets.objectnet": ("data.sets.base", "data.sets.imagenet", "data.sources"),
    "data.sets.conflicts": ("data.sets.base", "data.sets.imagenet", "data.sources"),
    "data.examples.regions": (
        *("data.examples", "data.fields", "data.geometry", "theory.trees"),
    ),
    "data.input": ("data.examples", "data.fields", "data.geometry"),
    "data.workers": ("data.fields", "data.input"),
    "data.pipeline": (
        *("data.decoding", "data.fields", "data.input", "data.sources.base"),
        "data.workers",
    ),
    "data.passes": (
        *("data.decoding", "data.fields", "data.input", "data.pipeline", "data.sets"),
        *("data.segments", "data.sources.base", "data.workers"),
    ),
    "data.trial": (
        *("data.decoding", "data.fields", "data.input", "data.pipeline"),
        "data.sources.base",
    ),
    "data.prepare": ("data.sources",),
    # Beside, used by jobs: pytrees in, pytrees out.
    "state": (),
    "sharding": ("kernels.base",),
    "optim": ("objectives.base", "ops.lars", "sharding"),
    # Keeping a run: these know no config ...
    "run.checkpoint": (
        *("run.digests", "run.files", "run.hosts", "run.interrupt", "run.storage"),
        *("sharding", "state"),
    ),
    "run.buckets": (),
    "run.lease": ("run.buckets",),
    "run.files": ("run.buckets",),
    "run.notes": ("run.files",),
    "run.hosts": (),
    "run.memory": (),
    "run.programs": (),
    "run.digests": ("sharding",),
    "run.storage": ("run.digests", "run.files", "run.hosts"),
    "run.parts": ("run.checkpoint", "run.digests", "run.files", "run.storage"),
    "run.interrupt": (),
    "run.log": ("run.events", "run.files", "run.wandb_run"),
    "run.events": ("run.files",),
    "run.spikes": (),
    "run.wandb_run": ("run.files",),
    "run.curves": ("evals.report", "run.files", "run.log"),
    "run.plugins": (),
    "run.shipped": (),
    "run.profiler": ("run.files", "run.hosts"),
    # The machinery of config trees, and the only module that knows all tables; below
    # it are built objects only.
    "schema": (),
    "trees": ("run.files", "run.plugins", "run.shipped"),
    "config": (
        *("data", "evals", "maskings", "models", "objectives", "optim", "sharding"),
        *("tokenizers", "trees"),
        *("run.checkpoint", "run.log", "run.plugins", "run.profiler", "run.spikes"),
    ),
    # Leaves of config trees; used by configs/.
    "presets": ("config",),
    "plan": (
        *("config", "data.input", "data.passes", "data.trial", "kernels.choice"),
        *("maskings.base", "objectives.base", "ops", "sharding", "state"),
    ),
    # ... and these do.
    "run.commandline": ("config", "run.shipped", "trees"),
    "run.rundir": (
        *("config", "run.digests", "run.files", "run.hosts", "run.lease"),
        "run.storage",
    ),
    "run.warmstart": (
        *("config", "ops", "run.files", "run.hosts", "run.parts", "run.rundir"),
        *("sharding", "state"),
    ),
    "run.loading": (
        *("config", "data.passes", "evals.base", "evals.report", "objectives.base"),
        *("plan", "run.files", "run.parts", "run.rundir", "state"),
    ),
    "interop": (
        *("config", "interop", "ops", "maskings.base", "models.vit", "state"),
        *("run.checkpoint", "run.digests", "run.files", "run.parts", "run.rundir"),
        "run.storage",
    ),
    # Reading what others wrote knows nothing of us.
    "interop.pickles": (),
    "interop.reading": ("interop.pickles", "run.files"),
    "interop.families": ("interop.names", "interop.reading"),
    "interop.pretrained": (
        *("config", "data.transforms", "interop", "maskings.random", "ops", "plan"),
        *("objectives.base", "run.files", "run.loading", "run.rundir", "state"),
    ),
    "run.replaced": (
        *("data.fields", "data.input", "data.pipeline"),
        *("run.files", "run.hosts", "run.log"),
    ),
    "run.monitor": (
        *("data.pipeline", "plan", "run.files", "run.hosts", "run.log"),
        *("run.replaced", "run.spikes"),
        "sharding",
    ),
    "run.beginning": (
        *("config", "data.pipeline", "plan", "run.checkpoint"),
        *("run.spikes", "run.warmstart"),
        *("sharding", "state"),
    ),
    "run.summary": (
        "config",
        "objectives.base",
        "plan",
        "run.files",
        "sharding",
        "state",
    ),
    "run.report": (
        *("config", "data.fields", "data.passes", "evals.base", "evals.report"),
        *("plan", "run.curves", "run.files", "run.hosts", "run.notes"),
        *("sharding", "state"),
    ),
    "run.during": (
        *("evals.base", "evals.report", "state"),
        *("run.files", "run.hosts", "run.interrupt", "run.log", "run.monitor"),
        *("run.report", "run.storage"),
    ),
    # Jobs, which do not know each other.
    "train": (
        *("config", "data.pipeline", "optim", "plan", "sharding", "state"),
        *("run.beginning", "run.checkpoint", "run.during", "run.files"),
        "run.interrupt",
        *("run.monitor", "run.profiler", "run.programs", "run.report"),
        *("run.rundir", "run.spikes"),
        *("run.notes", "run.summary", "run.wandb_run", "run.warmstart"),
    ),
    "evaluate": (
        *("config", "evals.base", "evals.report", "sharding", "state"),
        *("run.files", "run.loading", "run.notes", "run.rundir"),
    ),
    "weights": (
        *("config", "interop"),
        *("run.checkpoint", "run.commandline", "run.files", "run.notes"),
    ),
    "compare.table": ("evals.base", "evals.report", "run.loading"),
    "compare.sections": (
        *("compare.table", "evals.base", "evals.report", "evals.side_by_side"),
    ),
    "compare.losses": (
        *("compare.sections", "evals.report"),
        *("run.files", "run.loading", "run.log"),
    ),
    "compare.origins": ("run.loading", "run.notes", "run.rundir"),
    "compare.job": (
        *("compare.losses", "compare.origins", "compare.sections", "compare.table"),
        *("config", "evals.base", "evals.report", "evals.side_by_side"),
        *("run.files", "run.loading", "run.notes", "run.rundir", "schema"),
    ),
    "compare": ("compare.job",),
    "explore.models": (
        *("evals", "maskings.random", "objectives.base", "ops", "run.loading"),
    ),
    "explore.server": ("data.decoding", "explore.models", "run.loading"),
    "explore.job": (
        *("config", "explore.server"),
        *("run.files", "run.loading", "run.notes", "run.rundir"),
    ),
    # Studies: what is declared, then what is made of it. Their job runs others.
    "studies.facts": (),
    "studies.packing": (),
    "studies.grid": ("studies.facts",),
    "studies.runs": ("studies.grid",),
    "studies.p1": ("studies.facts", "studies.grid", "studies.runs"),
    "studies.p2": ("studies.facts", "studies.grid", "studies.runs"),
    "studies.theory": ("studies.facts", "studies.grid", "studies.p2", "studies.runs"),
    "studies.sizes": ("config", "evals.base", "presets", "studies.grid"),
    "studies.cells": (
        *("config", "data.sources.base", "data.sources.of_classes", "evals.base"),
        *("evals.report", "run.files", "run.parts", "run.rundir"),
        *("studies.grid", "studies.packing", "studies.sizes"),
    ),
    "studies.work": (
        *("config", "evals.base", "train"),
        *("run.files", "run.hosts", "run.loading", "run.programs", "run.rundir"),
        *("run.storage", "run.warmstart"),
        *("studies.cells", "studies.grid", "studies.sizes"),
    ),
    "studies.results": ("evals.base", "studies.cells", "studies.grid"),
    "studies.page": (
        *("evals.base", "evals.report", "run.files"),
        *("studies.cells", "studies.grid", "studies.results"),
    ),
    "studies.claims": (
        *("run.files", "studies.grid", "studies.page", "studies.results"),
    ),
    "studies.job": (
        *("config", "evals.base", "run.files", "run.interrupt", "run.rundir"),
        *("schema", "studies"),
    ),
    "__main__": ("main", "run.memory"),
    # Programs: `main` runs a job, `aot` compiles what job "train" would run.
    "main": (
        "run.memory",
        *("aot.doctor", "data.fields"),
        *("compare", "config", "evaluate", "explore.job", "studies.job", "train"),
        "sharding",
        *("run.checkpoint", "run.commandline", "run.files", "run.hosts"),
        *("run.interrupt", "run.rundir", "run.storage", "run.warmstart"),
    ),
    "aot": (
        *("aot", "config", "data.sources.base", "plan", "sharding", "train"),
        *("run.commandline", "run.warmstart"),
    ),
    "aot.doctor": (
        *("aot.devices", "aot.lines", "aot.step", "config", "data.passes"),
        *("data.pipeline", "plan"),
        *("run.files", "run.hosts", "run.loading", "run.rundir", "run.storage"),
        *("run.wandb_run", "run.warmstart", "sharding", "train"),
    ),
}
# Marks of fields and ConfigError: every module may import them.
ANYWHERE = ("schema",)
# The kinds of plug-in that have a room, whose base.py holds the base class.
ROOMS = {
    kind.__module__.removeprefix("mim_jax.").removesuffix(".base"): kind
    for kind in config.KINDS
    if kind.__module__.endswith(".base")
}
# What several plug-ins of a room share, besides its base.
USED_BY_PLUG_INS = {
    "evals": {
        *("features", "figures", "images", "logits", "occluded", "report"),
        "side_by_side",
    },
    "objectives": {"t2"},
    "data.sources": {"packaged", "drawings"},
}
# Another package's module: the only rooms that may import it.
ONLY_IN = {
    "flax.linen": ("models",),
    "tensorflow": ("data.prepare",),
    "tensorflow_datasets": ("data",),
    "torch": ("interop.pickles",),
    "orbax": ("run.checkpoint", "run.storage"),
    # A value that travels unseen is in no signature and in no cache key.
    "contextvars": (),
    "grain": ("data.pipeline", "data.workers"),
}
NEVER_IN_DATA = ("jax", "flax", "optax", "orbax")


def module(path: pathlib.Path) -> str:
    """`ops.masking` for mim_jax/ops/masking.py, `ops` for mim_jax/ops/__init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


@functools.cache
def parsed(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def imports(path: pathlib.Path) -> set[str]:
    """Full names of all that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def inside(name: str, rooms) -> bool:
    """Whether a dotted name is one of the rooms or in one of them."""
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


MODULES = {module(path): path for path in PACKAGE.rglob("*.py") if module(path)}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_from_lower_rows_only(name):
    if (PACKAGE / name.replace(".", "/")).is_dir():
        # A room's own list: itself only.
        allowed = (name,)
    else:
        rooms = [room for room in MAY_IMPORT if inside(name, [room])]
        assert rooms, (
            f"mim_jax.{name} has no row: add {name!r}: (WHAT IT MAY IMPORT,) to "
            "MAY_IMPORT in tests/house_test.py"
        )
        allowed = (*MAY_IMPORT[max(rooms, key=len)], *ANYWHERE)
    for found in imports(MODULES[name]) - {"mim_jax"}:
        if inside(found, ["mim_jax"]):
            below = found.removeprefix("mim_jax.")
            assert inside(below, allowed), (
                f"mim_jax.{name} imports {below}; its row in MAY_IMPORT of "
                f"tests/house_test.py allows {allowed}"
            )


def test_every_row_of_the_layers_exists():
    for room in MAY_IMPORT:
        assert inside(room, MODULES) or room in MODULES, (
            f"there is no mim_jax.{room}: remove its row from MAY_IMPORT"
        )


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_other_packages_stay_in_their_rooms(path):
    name = module(path) if path.is_relative_to(PACKAGE) else "configs"
    for found in imports(path):
        for package, rooms in ONLY_IN.items():
            assert not inside(found, [package]) or inside(name, rooms), (name, found)
        if inside(name, ["data"]):
            assert not inside(found, NEVER_IN_DATA), (name, found)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=str)
def test_a_config_file_imports_config_and_kinds_only(path):
    for found in imports(path):
        allowed = found in ("mim_jax.config", "mim_jax.presets")
        allowed = allowed or found.endswith(".SIZES")
        assert allowed or re.fullmatch(r"mim_jax\.[\w.]+\.base\.\w+", found), found


def unlisted(room: str, files: set[str], table: dict[str, type]) -> list[str]:
    """What to do for each plug-in file without a row, and each row without a file."""
    found = {cls.__module__.rsplit(".", 1)[1] for cls in table.values()}
    rooms = vars(importlib.import_module(f"mim_jax.{room}"))
    (name,) = (name for name, value in rooms.items() if value is table)
    where = f"{name} in mim_jax/{room.replace('.', '/')}/__init__.py"
    todo = [
        f"{file}.py has no row: add {file!r}: CLASS to {where}, or, where it is no "
        f"plug-in but shared by several, {file!r} to USED_BY_PLUG_INS in "
        "tests/house_test.py"
        for file in sorted(files - found)
    ]
    return todo + [
        f"{cls.__qualname__} of {cls.__module__} has a row in {where}, and no file of "
        "that room: move it there"
        for cls in table.values()
        if cls.__module__.rsplit(".", 1)[1] not in files
    ]


@pytest.mark.parametrize("room", ROOMS)
def test_every_plug_in_file_has_a_row_in_its_table(room):
    folder = PACKAGE / room.replace(".", "/")
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "base"}
    files -= USED_BY_PLUG_INS.get(room, set())
    todo = unlisted(room, files, config.KINDS[ROOMS[room]][1])
    assert not todo, "\n".join(todo)


@pytest.mark.parametrize("room", ROOMS)
def test_a_missing_row_is_told_with_its_place(room):
    _, table = config.KINDS[ROOMS[room]]
    files = {cls.__module__.rsplit(".", 1)[1] for cls in table.values()}
    (line,) = unlisted(room, files | {"mine"}, table)
    assert line.startswith("mine.py has no row: add 'mine': CLASS to ")
    assert f"mim_jax/{room.replace('.', '/')}/__init__.py" in line
    lone = next(file for file in files)
    assert any(
        "no file of that room" in it for it in unlisted(room, files - {lone}, table)
    )


@pytest.mark.parametrize("kind", config.KINDS)
def test_no_plug_in_inherits_from_another(kind):
    rows = list(config.KINDS[kind][1].values())
    assert kind.__abstractmethods__, f"{kind.__name__} demands nothing"
    for row in rows:
        assert not row.__abstractmethods__
        for other in rows:
            assert row is other or not issubclass(row, other), (
                f"{row.__name__} derives from the plug-in {other.__name__}: want what "
                "both need in the room's base.py or in ops/"
            )


# A default belongs to the field of a class, once.
TREES = re.compile(r"\b(c|cfg|config|configs|node|settings|tree)\b")


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_default_hides_where_a_config_is_read(path):
    for node in ast.walk(parsed(path)):
        if not isinstance(node, ast.Call):
            continue
        function = ast.unparse(node.func)
        if function.endswith(".get") and len(node.args) + len(node.keywords) > 1:
            assert not TREES.search(function), f"{path}:{node.lineno} {function}"
        if function == "getattr" and len(node.args) > 2:
            read = ast.unparse(node.args[0])
            assert not TREES.search(read), f"{path}:{node.lineno} getattr({read})"


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_open_with_their_licence_and_check_their_shapes(path):
    assert path.read_text().startswith("# SPDX-License-Identifier: Apache-2.0\n")
    # Annotations that are strings are not checked.
    assert "__future__.annotations" not in imports(path)


# What waits for devices, which may wait for other hosts, or for these.
WAITS = (
    *("device_get", "block_until_ready", "process_allgather", "broadcast_one_to_all"),
    *("sync_global_devices", "sync_global_processes", "result", "wait_until_finished"),
    "check_leaves",
)
ALONE = {
    "evals": "measures on one host",
    "compare": "runs on one host",
    "explore": "runs on one host",
    "evaluate": "runs on one host",
    "studies": "runs on one host",
    "interop": "runs on one host",
    "weights": "runs on one host",
    "run.parts": "reads alone",
    "run.pretrained": "runs on one host",
    "run.interrupt": "waits for a thread whose own waits end",
    "run.digests": "check_leaves is what waits; who calls it has the deadline",
}


@pytest.mark.parametrize("name", MODULES)
def test_no_host_waits_without_a_deadline(name):
    """`with deadline(...)`, also of `mim_jax.run.hosts`, is around each wait."""
    if inside(name, ALONE):
        return
    ends: set[ast.AST] = set()
    for node in ast.walk(parsed(MODULES[name])):
        given = [ast.unparse(i.context_expr) for i in getattr(node, "items", ())]
        if any(re.match(r"(hosts\.)?deadline\(", one) for one in given):
            ends |= set(ast.walk(node))
    for node in ast.walk(parsed(MODULES[name])):
        if isinstance(node, ast.Call) and node not in ends:
            function = ast.unparse(node.func).split(".")[-1]
            assert function not in WAITS, (
                f"mim_jax.{name}:{node.lineno}: {function} may wait for ever: want "
                "`with deadline(WHAT):` of mim_jax.run.hosts around it"
            )


def test_importing_starts_no_backend_and_needs_no_tensorflow():
    program = """
import importlib, sys
class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tensorflow":
            raise AssertionError(f"{name} is imported")
sys.meta_path.insert(0, Refused())
for name in sys.argv[1:]:
    importlib.import_module(name)
from jax._src import xla_bridge
assert not xla_bridge._backends, xla_bridge._backends
import jax
jax.devices()
assert xla_bridge._backends  # so that the line above would have seen one
"""
    names = [f"mim_jax.{name}" for name in MODULES]
    command = [sys.executable, "-c", program, *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_tests_reach_no_network():
    with socket.socket() as wire, pytest.raises(OSError, match="wants the network"):
        wire.connect(("192.0.2.1", 80))  # an address that is nobody's


def test_modules_that_annotate_arrays_are_checked_at_run_time():
    """pytest wraps only these: every call of a wrapped function costs microseconds, and
    config trees are made of millions of calls."""
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())
    options = options["tool"]["pytest"]["ini_options"]["addopts"].split()
    (option,) = (one for one in options if one.startswith("--jaxtyping-packages="))
    wrapped = option.partition("=")[2].split(",")
    for file in sorted((ROOT / "mim_jax").rglob("*.py")):
        if "from jaxtyping import" not in file.read_text():
            continue
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        assert any(f"{module}.".startswith(f"{one}.") for one in wrapped), module


def test_a_start_imports_nothing_slow_that_most_jobs_do_not_need():
    slow = ("sklearn", "scipy.stats", "skimage", "tensorboardX", "tensorflow_datasets")
    told = "import sys, mim_jax.main; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", told], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not set(slow) & set(done.stdout.split())
