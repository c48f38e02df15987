# SPDX-License-Identifier: Apache-2.0
"""Configs: generated, typed, saved and read again; every mistake has its message."""

import dataclasses
import json
import operator
import os
import pathlib
import subprocess
import sys

import flax.linen
import pytest
from absl import flags
from absl.testing import flagsaver
from ml_collections import config_dict, config_flags

from mim_jax import config, main
from mim_jax.config import ConfigError
from mim_jax.data.sources.base import Source
from mim_jax.maskings.base import Masking
from mim_jax.maskings.grid import GridMasking
from mim_jax.maskings.random import Random
from mim_jax.models.vit import Encoder
from mim_jax.objectives.base import Objective
from mim_jax.objectives.mae import MAE
from mim_jax.optim import LARS, AdamW

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def train(**choices) -> config.Tree:
    return config.experiment("train", **({"source": "digits"} | choices))


def message(function, *args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        function(*args, **kwargs)
    return str(caught.value)


def saved(tmp_path, tree, **changes) -> str:
    """config.json of a tree, with changes by dotted path."""
    values = json.loads(config.dumps(tree))
    for path, value in changes.items():
        node = values
        *above, name = path.split("__")
        for part in above:
            node = node[part]
        node[name] = value
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    return str(path)


def stated(cls) -> set[str]:
    """Names of the fields of a class that a config states."""
    fields = dataclasses.fields(cls)
    marks = {"shared", "internal"}
    marked = {field.name for field in fields if marks & field.metadata.keys()}
    own = {"parent", "name"} if issubclass(cls, flax.linen.Module) else set()
    return {field.name for field in fields} - marked - own


def names(kind) -> str:
    """The known names of a kind, as messages list them."""
    return ", ".join(sorted(config.KINDS[kind][1]))


# Trees and classes.


@pytest.mark.parametrize("cls", [AdamW, Random, Encoder, GridMasking])
def test_schema_states_each_default_of_the_class(cls):
    tree = config.schema(cls)
    for field in dataclasses.fields(cls):
        if field.name in tree:
            assert tree[field.name] == field.default
    assert tree.is_locked


@pytest.mark.parametrize("value", [config.Train, {"job": "train"}, None], ids=str)
def test_only_a_tree_is_built(value):
    found = message(config.build, value)
    assert found.startswith(f"build({value!r}): want the tree of a job, from config.e")


def test_defaults_build_the_default_objects():
    built = config.build(train())
    assert built.objective == MAE(
        encoder=Encoder(dtype="bfloat16", remat="dots"),
        decoder=dataclasses.replace(MAE().decoder, dtype="bfloat16", remat="dots"),
    )
    assert built.optim == AdamW()


def test_a_default_object_may_differ_from_its_class():
    @dataclasses.dataclass(frozen=True)
    class Holder:
        encoder: Encoder = Encoder(width=192)
        masking: Masking = GridMasking(cell=4)
        random: Masking = Random(unit=32)

    tree = config.schema(Holder)
    assert tree.encoder.width == 192 and tree.encoder.depth == Encoder().depth
    assert tree.masking.to_dict() == {"name": "grid", "cell": 4}
    assert tree.random.unit == 32


def test_shared_fields_are_set_once_for_all():
    tree = train()
    assert "dtype" not in tree.objective.encoder
    tree.dtype, tree.remat = "float32", "full"
    built = config.build(tree)
    assert built.objective.encoder.dtype == built.objective.decoder.dtype == "float32"
    assert built.objective.encoder.remat == built.objective.decoder.remat == "full"


def test_a_name_that_is_shared_anywhere_is_shared_everywhere():
    """Else a network would have a dtype of its own, float32, without a word."""
    found, waiting = set(), list(config.JOBS.values())
    while waiting:
        cls = waiting.pop()
        found.add(cls)
        kinds = [field.type for field in dataclasses.fields(cls)]
        below = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
        for kind in set(kinds) & set(config.KINDS):
            below += config.KINDS[kind][1].values()
        waiting += set(below) - found
    fields = [
        (cls, field)
        for cls in found - set(config.JOBS.values())
        for field in dataclasses.fields(cls)
    ]
    names = {field.name for _, field in fields if "shared" in field.metadata}
    assert names
    for cls, field in fields:
        if field.name in names:
            assert "shared" in field.metadata, f"{cls.__name__}.{field.name}"


def test_a_plug_in_is_chosen_where_it_belongs():
    tree = train(masking="grid", source="photos")
    assert tree.objective.masking.to_dict() == {"name": "grid", "cell": 2}
    assert tree.data.source.name == "photos"
    assert "masking" not in tree and "source" not in tree
    assert "eval" not in train(eval="reconstruction")  # that field is called report
    assert config.build(tree).objective.masking == GridMasking(cell=2)
    assert tree.objective.masking.is_locked and tree.is_locked


def test_choose_sets_values():
    node = config.choose(Masking, "random", ratio=0.9, unit=32)
    assert (node.ratio, node.unit, node.partial_units) == (0.9, 32, "round")
    tree = train()
    tree.objective.masking = node
    assert config.build(tree).objective.masking == Random(ratio=0.9, unit=32)


def test_ints_are_good_floats():
    tree = train()
    tree.epochs = 5
    tree.data.crop_scale = (0.5, 1)
    tree.optim.warmup_epochs = 1
    built = config.build(tree)
    assert [type(x) for x in (built.epochs, *built.data.crop_scale)] == [float] * 3


@pytest.mark.parametrize("kind", config.KINDS)
def test_every_plug_in_of_every_table_has_a_tree(kind):
    word, table = config.KINDS[kind]
    for name, cls in table.items():
        assert issubclass(cls, kind)
        tree = config.choose(kind, name)
        assert tree.name == name, word
        assert set(tree) - {"name"} == stated(cls)


def test_jobs_are_those_of_main():
    assert config.JOBS.keys() == main.JOBS.keys()


# Saving and loading.


@pytest.mark.parametrize("choices", [{}, dict(masking="block"), dict(source="photos")])
def test_a_saved_config_builds_the_same_objects(tmp_path, choices):
    tree = train(**choices)
    tree.steps, tree.data.image_size, tree.objective.mean = 7, (8, 16), (0.5,)
    again = config.load(saved(tmp_path, tree))
    assert config.dumps(again) == config.dumps(tree)
    assert config.build(again) == config.build(tree)
    assert config.difference(again, tree) == []


def test_a_saved_eval_builds_the_same_objects(tmp_path):
    tree = config.experiment("eval", eval="reconstruction")
    tree.run, tree.step = "runs/mae", 5
    again = config.load(saved(tmp_path, tree))
    assert config.build(again) == config.build(tree)


def test_every_value_is_stated(tmp_path):
    saved = json.loads(config.dumps(train()))

    def check_node(cls, node):
        assert set(node) - {"job", "name"} == stated(cls)
        for field in dataclasses.fields(cls):
            if field.name not in node:
                continue
            if dataclasses.is_dataclass(field.type):
                check_node(field.type, node[field.name])
            elif field.type in config.KINDS:
                table = config.KINDS[field.type][1]
                check_node(table[node[field.name]["name"]], node[field.name])

    check_node(config.Train, saved)
    assert saved["steps"] is None and saved["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "cls, field, default, leaf, before, after",
    [
        (config.Train, "steps", 5, "steps", None, 5),
        (config.Train, "optim", AdamW(b2=0.999), "optim.b2", 0.95, 0.999),
        (MAE, "masking", Random(unit=32), "objective.masking.unit", None, 32),
        (MAE, "encoder", Encoder(patch=8), "objective.encoder.patch", 16, 8),
    ],
)
def test_a_changed_default_does_not_change_an_old_run(
    tmp_path, monkeypatch, cls, field, default, leaf, before, after
):
    path = saved(tmp_path, train())
    (changed,) = (one for one in dataclasses.fields(cls) if one.name == field)
    monkeypatch.setattr(changed, "default", default)
    value = operator.attrgetter(leaf)
    assert value(train(objective="mae")) == after
    assert value(config.load(path)) == before
    assert value(config.build(config.load(path))) == before


def test_leaves_that_an_older_version_lacked_get_their_defaults(tmp_path):
    values = json.loads(config.dumps(train()))
    del values["optim"]["b2"], values["objective"]["masking"]["unit"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert config.load(tmp_path / "config.json") == train()


def test_an_optimiser_without_a_name_is_that_of_older_versions(tmp_path, monkeypatch):
    values = json.loads(config.dumps(train()))
    del values["optim"]["name"]
    values["optim"]["b2"] = 0.5
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    (field,) = (one for one in dataclasses.fields(config.Train) if one.name == "optim")
    monkeypatch.setattr(field, "default", LARS())  # even if another one is usual now
    assert config.build(config.load(path)).optim == AdamW(b2=0.5)


@pytest.mark.parametrize("name", [None, 3, ["mae"], {}])
def test_other_groups_need_their_name(tmp_path, name):
    path = saved(tmp_path, train(), objective__name=name)
    expected = f"{path}: config.objective: objective {name!r} is unknown"
    assert message(config.load, path).startswith(expected)


def test_difference_names_what_changed():
    old, new = train(), train(masking="grid")
    new.optim.base_lr = 1.0
    assert config.difference(old, new) == [
        "config.objective.masking.cell: '(absent)' -> 2",
        "config.objective.masking.name: 'random' -> 'grid'",
        "config.objective.masking.partial_units: 'round' -> '(absent)'",
        "config.objective.masking.ratio: 0.75 -> '(absent)'",
        "config.objective.masking.unit: None -> '(absent)'",
        "config.optim.base_lr: 0.00015 -> 1.0",
    ]


def test_difference_ignores_what_is_free():
    old, new = train(), train()
    new.stop_after, new.log.every, new.checkpoint.every = 3, 1, 1
    new.compile_cache, new.profile, new.on_change = False, "1:2", "accept"
    new.data.workers, new.data.threads, new.data.prefetch = 0, 1, 1
    new.plugins = ("json",)
    assert config.difference(old, new) == []
    new.seed = 1
    assert config.difference(old, new) == ["config.seed: 0 -> 1"]


# Mistakes in Python.

WORDS = ", ".join(sorted(word for word, _ in config.KINDS.values()))

MISTAKES = [
    (
        lambda: config.experiment("trian"),
        "job 'trian' is unknown (did you mean 'train'?); known: compare, eval, "
        "explore, study, train",
    ),
    (
        lambda: config.experiment("train", objective="mea"),
        "objective 'mea' is unknown (did you mean 'mae'?); known: "
        f"{names(Objective)}; --plugins=MODULE adds yours",
    ),
    (
        lambda: config.experiment("train", masking="gird"),
        "masking 'gird' is unknown (did you mean 'grid'?); known: "
        f"{names(Masking)}; --plugins=MODULE adds yours",
    ),
    (
        lambda: config.experiment("train", source="imagenet"),
        f"source 'imagenet' is unknown; known: {names(Source)}; --plugins=MODULE adds",
    ),
    (
        lambda: config.experiment("train", maskin="grid"),
        "kind of plug-in 'maskin' is unknown (did you mean 'masking'?); known: "
        + WORDS,
    ),
    (
        lambda: config.experiment("eval", masking="grid"),
        "masking=grid: this config has no masking",
    ),
    (
        lambda: config.choose(Masking, "random", ration=0.5),
        "masking 'random' has no field 'ration' (did you mean 'ratio'?); it has: "
        "partial_units, ratio, unit",
    ),
    (
        lambda: config.variant("fotos", ("photos",)),
        "variant 'fotos' is unknown (did you mean 'photos'?); known: photos",
    ),
    (
        lambda: config.variant("photos,maskng=grid", ("photos",)),
        "kind of plug-in 'maskng' is unknown (did you mean 'masking'?); known: "
        + WORDS,
    ),
    (
        lambda: config.read("configs/mea.py"),
        "config file 'configs/mea.py' is unknown (did you mean 'mae'?)",
    ),
]


@pytest.mark.parametrize("call, expected", MISTAKES, ids=[it[1] for it in MISTAKES])
def test_an_unknown_name_gets_the_known_ones(call, expected):
    assert message(call).startswith(expected)


def test_a_typo_in_a_config_file_raises_at_once():
    with pytest.raises(AttributeError, match='Did you mean "epochs"'):
        train().epoch = 5
    with pytest.raises(TypeError, match="steps"):
        train().steps = "many"


EVALUATE = sorted(field.name for field in dataclasses.fields(config.Evaluate))

# Values that the classes refuse, as leaf, value and message.
REFUSED = [
    ("seed", -1, "config.seed=-1: want 0 <= seed <= 2147483647"),
    ("epochs", 0.0, "config.epochs=0.0: want 0 < epochs <= 1000000"),
    ("steps", 0, "config.steps=0: want 1 <= steps <= 2147483647"),
    ("stop_after", -2, "config.stop_after=-2: want 1 <= stop_after <= 2"),
    (
        "accumulate",
        3,
        "config.batch_size=1024 in accumulate=3 micro-batches: want a multiple",
    ),
    (
        "dtype",
        "float16",
        "config.dtype='float16' is unknown; known: bfloat16, float32, float64",
    ),
    ("remat", "some", "config.remat='some' is unknown; known: none, dots, full"),
    ("on_change", "ask", "config.on_change='ask' is unknown; known: refuse, accept"),
    ("optim.base_lr", 0.0, "config.optim.base_lr=0.0: want 0 < base_lr <= 1"),
    (
        "optim.b2",
        1.0,
        "config.optim.b2=1.0: want 0 <= b2 < 1",
    ),
    (
        "optim.weight_decay",
        -0.1,
        "config.optim.weight_decay=-0.1: want 0 <= weight_decay <= 1000",
    ),
    (
        "optim.warmup_epochs",
        100.0,
        "config.optim.warmup_epochs=100.0: want less than the run's epochs=100.0",
    ),
    (
        "objective.masking.ratio",
        1.5,
        "config.objective.masking.ratio=1.5: want 0 < ratio < 1",
    ),
    (
        "objective.masking.unit",
        0,
        "config.objective.masking.unit=0: want 1 <= unit <= 16384",
    ),
    (
        "objective.masking.partial_units",
        "rund",
        "config.objective.masking.partial_units 'rund' is unknown (did you mean "
        "'round'?); known: allow, round",
    ),
    ("data.image_size", (8,), "config.data.image_size=(8,): want 2 values"),
    ("data.image_size", (8.5, 8), "config.data.image_size=8.5: want int"),
    (
        "data.crop_scale",
        (0.5, 0.1),
        "config.data.crop_scale=(0.5, 0.1): want least <= greatest",
    ),
    ("data.crops", 3, "config.data.crops 3 is unknown; known: 1, 2"),
    ("data.workers", -1, "config.data.workers=-1: want 0 <= workers <= 1024"),
    ("checkpoint.every", 0, "config.checkpoint.every=0: want at least 1"),
    ("log.every", 0, "config.log.every=0: want at least 1"),
    (
        "mesh.fsdp",
        0,
        "config.mesh.fsdp=0: want 1 <= fsdp <= 1048576",
    ),
    ("job", "trian", "job 'trian' is unknown (did you mean 'train'?)"),
    (
        "job",
        "eval",
        f"config has no field 'accumulate'; it has: {', '.join(EVALUATE)}",
    ),
    (
        "objective.name",
        "mea",
        "config.objective: objective 'mea' is unknown (did you mean 'mae'?)",
    ),
    (
        "objective.masking.name",
        "grid",
        "config.objective.masking.name='grid' has the fields ['cell'], not "
        "['partial_units', 'ratio', 'unit']: choose the masking in the config file "
        "or by its variant, --config=configs/FILE.py:masking=grid",
    ),
]


@pytest.mark.parametrize("leaf, value, expected", REFUSED)
def test_a_value_out_of_range_names_itself_and_the_bound(leaf, value, expected):
    tree = node = train()
    *above, name = leaf.split(".")
    for part in above:
        node = node[part]
    node[name] = value
    assert message(config.build, tree).startswith(expected)


def test_an_eval_without_a_run_says_so():
    assert message(config.build, config.experiment("eval")) == (
        "config: run is empty: name a run directory, e.g. --config.run=runs/mae"
    )


# Mistakes in a saved file: it may come from somebody else.


@pytest.mark.parametrize(
    "changes, expected",
    [
        (
            dict(job="os.system"),
            ": job 'os.system' is unknown; known: compare, eval, explore, study, train",
        ),
        (dict(job=None), " names no job: want the config.json of a run"),
        (dict(job=["eval"]), ": job ['eval'] is unknown"),
        (
            dict(objective__name="mim_jax.objectives.mae.MAE"),
            ": config.objective: objective 'mim_jax.objectives.mae.MAE' is unknown",
        ),
        (dict(objective="mae.MAE"), ": config.objective: objective 'mae.MAE' is"),
        (
            dict(optim__b3=0.5),
            ": config.optim has no field 'b3'; it has: b1, b2",
        ),
        (dict(optim=[1]), ": config.optim=[1]: want a group of fields"),
        (dict(steps="many"), ": config.steps='many': want int"),
        (dict(epochs=None), ": config.epochs=None: want float"),
        (dict(scan=1), ": config.scan=1: want bool"),
        (dict(seed=True), ": config.seed=True: want int"),
        (dict(data__image_size=5), ": config.data.image_size=5: want tuple"),
        (dict(data__image_size=[5, "a"]), ": config.data.image_size='a': want int"),
    ],
    ids=str,
)
def test_a_saved_file_is_checked_against_the_classes(tmp_path, changes, expected):
    path = saved(tmp_path, train(), **changes)
    assert message(config.load, path).startswith(path + expected)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_file_that_is_no_config(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    assert message(config.load, path).startswith(f"{path}")


def test_a_smuggled_field_reaches_no_class():
    tree = train()
    with tree.unlocked():
        tree.optim = config_dict.ConfigDict(dict(tree.optim) | {"hook": 1})
    assert message(config.build, tree).startswith("config.optim.name='adamw' has the")
    tree = train()
    with tree.unlocked():
        tree.log = config_dict.ConfigDict(dict(tree.log) | {"hook": 1})
    assert message(config.build, tree).startswith("config.log has no field 'hook'")


# The command line.


def parsed(*leaves: str, file: str = "configs/mae.py:photos") -> config.Tree:
    """The tree as main gets it from these flags, without main's own."""
    argv = ["main", f"--config={file}", *(f"--config.{leaf}" for leaf in leaves)]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    values(argv)
    return values["config"].value


def test_leaves_are_set_from_the_command_line():
    tree = parsed(
        "steps=5",  # a leaf that is None by default
        "objective.masking.unit=16",
        "objective.masking.partial_units=allow",
        "data.image_size=(64,32)",
        "scan=false",
        "data.flip=0",
        "optim.base_lr=1",
        "checkpoint.keep_every=7",
        "mesh.fsdp=2",
    )
    built = config.build(tree)
    assert built.steps == 5 and built.optim.base_lr == 1.0
    assert built.objective.masking == Random(unit=16, partial_units="allow")
    assert built.data.image_size == (64, 32)
    assert built.scan is built.data.flip is False
    assert built.checkpoint.keep_every == 7 and built.mesh.fsdp == 2


def test_plug_ins_are_chosen_by_the_variant():
    tree = parsed("objective.masking.cell=4", file="configs/mae.py:photos,masking=grid")
    assert config.build(tree).objective.masking == GridMasking(cell=4)
    tree = config.read("configs/mae.py:photos,source=digits")
    assert tree.data.source.name == "digits" and tree.data.image_size == (32, 32)


@pytest.mark.parametrize("leaf", ["steps=many", "steps=1.5", "scan=maybe"])
def test_a_value_of_another_type_is_refused_at_once(leaf):
    with pytest.raises(flags.Error, match=leaf):
        parsed(leaf)


@pytest.mark.parametrize(
    "path, expected",
    [
        ("objectiv.x", "config has no field 'objectiv' (did you mean 'objective'?)"),
        (
            "objective.masking.ration",
            "config.objective.masking has no field 'ration' (did you mean 'ratio'?); "
            "it has: partial_units, ratio, unit",
        ),
        (
            "log.evry",
            "config.log has no field 'evry' (did you mean 'every'?); it has: e",
        ),
        ("log.rate", "config.log has no field 'rate'; it has: every, progress, tensor"),
        (
            "log",
            "config.log is a group: set its fields, every, progress, tensorboard, ",
        ),
        ("steps.x", "config.steps is a single value: it has no field 'x'"),
        (
            "optim",
            "config.optim is a group: set its fields, "
            f"{', '.join(sorted({*stated(AdamW), 'name'}))}, one by one; choose the "
            "optimiser in the config file or by its variant",
        ),
        (
            "objective.masking",
            "config.objective.masking is a group: set its fields, name, "
            "partial_units, ratio, unit, one by one; choose the masking in the config "
            "file or by its variant, --config=configs/FILE.py:masking=NAME",
        ),
    ],
)
def test_a_path_is_checked_against_the_tree(path, expected):
    assert message(config.check_path, train(), path).startswith(expected)
    config.check_path(train(), "objective.masking.ratio")


def program(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mim_jax.main", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=ROOT
    )


def test_a_typo_on_the_command_line_is_one_line(tmp_path):
    done = program(
        "--config=configs/mae.py:photos",
        "--config.objectiv.x=1",
        f"--workdir={tmp_path / 'run'}",
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line == (
        "error: config has no field 'objectiv' (did you mean 'objective'?); it has: "
        + ", ".join(sorted(stated(config.Train)))
    )
    assert not (tmp_path / "run").exists()  # nothing was begun


def test_missing_data_say_how_to_get_them(tmp_path):
    done = program(
        "--config",
        "configs/mae.py",
        f"--config.data.source.data_dir={tmp_path}",
        f"--workdir={tmp_path / 'run'}",
    )
    assert done.returncode == 2
    assert done.stdout == "" and "Traceback" not in done.stderr
    expected = "error: config.data.source: data set 'imagenet2012' is not prepared"
    assert done.stderr.startswith(expected)
    assert f"mim_jax.data.prepare imagenet2012 --data_dir={tmp_path}" in done.stderr
    assert "--config=configs/mae.py:photos" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--config=configs/mae.py:fotos"], "error: variant 'fotos' is unknown"),
        (["--config", "configs/nix.py"], "error: config file 'configs/nix.py' is unk"),
        (
            ["--config=configs/mae.py:photos", "--config.steps=many"],
            "error: flag --config.steps=many: ",
        ),
        (["--confg=configs/mae.py"], "error: Unknown command line flag 'confg'"),
        ([], "error: flag --config=None: Flag --config must have a value"),
        (
            ["-config=configs/mae.py:photos", "--noconfig.scam"],
            "error: config has no field 'scam' (did you mean 'scan'?)",
        ),
    ],
)
def test_what_is_wrong_with_the_flags_is_one_line(
    monkeypatch, capfd, arguments, expected
):
    class Left(Exception):
        pass

    def leave(code):
        raise Left(code)

    argv = ["main", "--workdir=run", *arguments]
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(sys, "argv", argv)
    with flagsaver.flagsaver(), pytest.raises(Left, match="2"):
        main.parse(argv)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(expected)
