# SPDX-License-Identifier: Apache-2.0
"""What a run and its length decide of an objective, and how the config states it."""

import copy
import dataclasses
import functools
import operator

import pytest
from PIL import Image
from tiny import TINY, tree_of

from mim_jax import config
from mim_jax.data.sources.base import Source
from mim_jax.objectives.base import Objective
from mim_jax.objectives.probe import Probe
from mim_jax.plan import Plan
from mim_jax.run import commandline, rundir, warmstart

OBJECTIVES = config.KINDS[Objective][1]
# No value is that of `tree_of`.
OTHER = {
    "encoder.patch": 4,
    "encoder.width": 48,
    "encoder.depth": 3,
    "encoder.heads": 6,
    "encoder.mlp_ratio": 2.0,
    "mean": (0.125,),
    "std": (0.75,),
}
FOR_A_PROBE = {"encoder.positions": "learned", "encoder.norm": "pooled"}


@pytest.fixture
def run(tmp_path):
    """The config of a run: a classifier by the mean token, with learned positions."""
    leaves = {f"objective__{k.replace('.', '__')}": v for k, v in OTHER.items()}
    tree = tree_of("supervised", **leaves)
    assert config.build(tree).objective.feature == "avg"
    for path, value in FOR_A_PROBE.items():
        assert operator.attrgetter(path)(tree.objective) == value
    rundir.write_config(tmp_path, tree)
    return tmp_path


@pytest.mark.parametrize("name", TINY)
def test_the_run_that_another_begins_with_decides_these_leaves(name, run):
    tree = tree_of(name, init_from__run=str(run))
    before = config.dumps(tree)
    adopted = warmstart.adopt(tree)
    assert config.dumps(tree) == before
    probe = issubclass(OBJECTIVES[name], Probe)
    expected = OTHER | (FOR_A_PROBE | {"pool": "avg"} if probe else {})
    changed = [line.split(":")[0] for line in config.difference(tree, adopted)]
    assert set(changed) <= {f"config.objective.{path}" for path in expected}
    assert len(changed) >= len(OTHER)
    for path, value in expected.items():
        assert operator.attrgetter(path)(adopted.objective) == value
    assert adopted.is_locked and adopted.objective.encoder.is_locked


def test_a_run_that_has_begun_is_asked_itself(run, tmp_path):
    workdir = tmp_path / "begun"
    workdir.mkdir()
    tree = tree_of("mae", init_from__run=str(run))
    rundir.write_config(workdir, warmstart.adopt(tree))
    (run / "config.json").unlink()
    assert warmstart.adopt(tree, workdir).objective.encoder.width == 48


@pytest.mark.parametrize("name", TINY)
def test_the_length_of_a_run_is_no_leaf(name):
    tree = tree_of(name)
    objective = config.build(tree).objective
    longer = objective.for_run(77)
    fields = {field.name for field in dataclasses.fields(objective)}
    differ = {f for f in fields if getattr(objective, f) != getattr(longer, f)}
    assert differ == {"total_steps"} & fields
    assert differ <= {"total_steps"} - set(tree.objective)
    assert not differ or longer.total_steps == 77


# What the run decides of the data, and the source of the classes.


@pytest.fixture
def folder_run(tmp_path):
    """The config of a run on three folders of images; it holds out a part of each."""
    for name in ("cat", "dog", "eel"):
        (tmp_path / "pics" / name).mkdir(parents=True)
        for i in range(4):
            image = Image.new("RGB", (9, 9), (i, 0, 0))
            image.save(tmp_path / "pics" / name / f"{i}.png")
    tree = config.read("configs/mae.py:tiny,source=folder")
    tree.data.source.path, tree.data.flip = str(tmp_path / "pics"), False
    (tmp_path / "run").mkdir()
    rundir.write_config(tmp_path / "run", tree)
    return tmp_path / "run"


def begun(file, run, leaves=None):
    """The config of a run that begins with another one, as the program makes it."""
    tree = config.read(f"configs/{file}")
    tree.init_from.run = str(run)
    for path, value in (leaves or {}).items():
        tree.update_from_flattened_dict({path: value})
    commandline.prefer(tree, list(leaves or {}))
    return warmstart.counted(warmstart.adopt(tree))


@pytest.mark.parametrize("file", ["finetune.py", "linear_probe.py", "finetune.py:tiny"])
def test_labels_are_learned_on_the_data_of_the_other_run(file, folder_run):
    tree = begun(file, folder_run)
    assert tree.data.source == config.load(folder_run / "config.json").data.source
    assert tuple(tree.data.image_size) == (64, 64) and tree.data.flip is False
    assert tree.objective.classes == 3
    config.build(tree)


def test_a_run_of_before_these_leaves_goes_on(folder_run, tmp_path):
    now = begun("finetune.py", folder_run)
    assert now.init_from.data and now.count_classes
    before = copy.deepcopy(now)
    before.init_from.data, before.count_classes = (), False
    workdir = tmp_path / "begun"
    workdir.mkdir()
    rundir.write_config(workdir, before)
    assert rundir.check_config(workdir, now) == []  # no line, and no refusal


def test_what_a_user_names_is_not_taken(folder_run, tmp_path):
    leaves = {"data.image_size": (32, 32), "objective.classes": 7}
    tree = begun("finetune.py", folder_run, leaves)
    assert tuple(tree.data.image_size) == (32, 32) and tree.objective.classes == 7
    assert tree.data.source.name == "folder"
    tree = begun("linear_probe.py:source=digits", folder_run)
    assert tree.data.source.name == "digits" and tree.objective.classes == 10
    assert tuple(tree.data.image_size) == (64, 64)
    tree = begun("finetune.py:mnist", folder_run)
    assert tree.data.source.name == "mnist" and tree.data.image_size == (28, 28)
    assert tree.objective.classes == 10


def test_all_labels_fine_tune_what_a_few_images_trained(folder_run, tmp_path):
    tree = config.load(folder_run / "config.json")
    with tree.data.unlocked():
        whole = tree.data.source
        tree.data.source = config.choose(Source, "few", source=whole, images=2)
    (tmp_path / "few").mkdir()
    rundir.write_config(tmp_path / "few", tree)
    taken = begun("finetune.py", tmp_path / "few").data.source
    assert taken.to_dict() == whole.to_dict()


def test_a_source_without_labels_has_no_classes_to_count(folder_run):
    tree = begun("finetune.py:source=photos", folder_run)
    assert tree.objective.classes == 1000  # the plan says that there are no labels
    with pytest.raises(config.ConfigError, match="no labels"):
        Plan.of(tree)


# What the user gave.


@pytest.mark.parametrize("leaf", ["pool", "mean", "encoder.depth"])
def test_a_value_that_was_given_is_not_replaced_without_a_word(leaf, run):
    tree = tree_of("probe", init_from__run=str(run))
    mine = operator.attrgetter(leaf)(tree.objective)
    theirs = {"pool": "avg"} | OTHER
    with pytest.raises(config.ConfigError) as caught:
        warmstart.check_given(tree, ["seed", f"objective.{leaf}"])
    assert str(caught.value) == (
        f"config.objective.{leaf}={mine!r}: {run} decides it, and has "
        f"{theirs[leaf]!r}: want no value here, or yours in spite of that, by "
        f"--config.init_from.keep='(\"{leaf}\",)'"
    )
    # The run's own value may be given, and so may leaves that it does not decide.
    *above, name = leaf.split(".")
    node = functools.reduce(operator.getitem, above, tree.objective)
    node[name] = theirs[leaf]
    warmstart.check_given(tree, ["seed", f"objective.{leaf}", "objective.classes"])


def test_a_leaf_is_kept_if_the_config_says_so(run, tmp_path):
    tree = tree_of("probe", init_from__run=str(run))
    tree.objective.pool, tree.init_from.keep = "cls", ("pool", "encoder.norm")
    adopted = warmstart.adopt(tree)
    assert adopted.objective.pool == "cls"
    assert adopted.objective.encoder.norm == tree.objective.encoder.norm == "tokens"
    assert adopted.objective.mean == OTHER["mean"]
    warmstart.check_given(tree, ["objective.pool"])
    # So it stays when the run goes on.
    workdir = tmp_path / "begun"
    workdir.mkdir()
    rundir.write_config(workdir, adopted)
    assert warmstart.adopt(tree, workdir).objective.pool == "cls"
    tree.init_from.keep = ("pol",)
    with pytest.raises(config.ConfigError, match="no field 'pol' .did you mean 'pool'"):
        warmstart.adopt(tree)
