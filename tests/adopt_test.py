# SPDX-License-Identifier: Apache-2.0
"""What a run and its length decide of an objective, and how the config states it."""

import dataclasses
import operator

import pytest
from tiny import tree_of

from mim_jax import config
from mim_jax.objectives.base import Objective
from mim_jax.objectives.probe import Probe
from mim_jax.run import rundir, warmstart

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


@pytest.mark.parametrize("name", OBJECTIVES)
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


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_length_of_a_run_is_no_leaf(name):
    tree = tree_of(name)
    objective = config.build(tree).objective
    longer = objective.for_run(77)
    fields = {field.name for field in dataclasses.fields(objective)}
    differ = {f for f in fields if getattr(objective, f) != getattr(longer, f)}
    assert differ == {"total_steps"} & fields
    assert differ <= {"total_steps"} - set(tree.objective)
    assert not differ or longer.total_steps == 77
