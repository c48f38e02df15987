# SPDX-License-Identifier: Apache-2.0
"""A run that begins with the parameters of another: what is taken, what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY, leaves, tree_of

from mim_jax import config, evaluate
from mim_jax import state as states
from mim_jax.ops.patches import Grid, sincos_2d
from mim_jax.ops.posembed import resized
from mim_jax.plan import Plan
from mim_jax.run import rundir, warmstart
from mim_jax.run.checkpoint import Checkpointer, Checkpoints
from mim_jax.run.parts import read_parts

QKV = "encoder/block00/attn/qkv/kernel"
# An encoder of another size than that of `tree_of`.
OTHER = dict(objective__encoder__width=24, objective__mean=(0.25,))


def first_state(plan: Plan):
    like = plan.abstract_state()
    placed = jax.tree.map(lambda leaf: leaf.sharding, like)
    create = jax.jit(plan.create, out_shardings=placed)
    return create.lower().compile()(), like


def save(name: str, workdir, **changes) -> None:
    """A run directory, as after training: no parameter is what it was at first."""
    workdir.mkdir(parents=True)
    tree = tree_of(name, **changes)
    state, _ = first_state(Plan.of(tree, jax.devices()[:1]))
    rng = np.random.default_rng(0)

    def moved(tree):
        def noisy(x):
            return x + 0.1 * jnp.asarray(rng.standard_normal(x.shape), x.dtype)

        return jax.tree.map(noisy, tree)

    with Checkpointer(workdir, Checkpoints()) as checkpointer:
        new = {part: moved(getattr(state, part)) for part in ("params", "teacher")}
        stats = jax.tree.map(jnp.abs, moved(state.stats))
        checkpointer.save(2, dataclasses.replace(state, **new, stats=stats), {})
    rundir.write_config(workdir, tree)


def begin(name: str, run, **changes):
    """(parameters per block, all of the state, what is told, the config) of step 0."""
    tree = warmstart.adopt(tree_of(name, init_from__run=str(run), **changes))
    plan = Plan.of(tree, jax.devices()[:1])
    state, like = first_state(plan)
    state, account = warmstart.begun(state, like, plan.settings)
    assert jax.tree.structure(state) == jax.tree.structure(like)
    return leaves(states.unstack_blocks(state.params)), state, account, tree


def given(run, part: str = "params"):
    return leaves(read_parts(run, parts=(part,))[1][part])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run directories of MAE, C-MAE and a classifier."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("mae", "cmae"):
        save(name, folder / name, **OTHER)
    save("supervised", folder / "supervised")
    return folder


@pytest.mark.parametrize("scan", [False, True])
def test_finetuning_begins_with_the_encoder(runs, scan):
    source = given(runs / "mae")
    got, _, account, tree = begin(
        "supervised",
        runs / "mae",
        scan=scan,
        objective__encoder__depth=1,  # the run decides
    )
    taken = {
        path for path in got if path in source and (got[path] == source[path]).all()
    }
    norm = {"encoder/norm/bias", "encoder/norm/scale"}
    assert taken == {path for path in source if path.startswith("encoder/")} - norm
    # The norm after pooling is another one than that of tokens.
    assert (got["encoder/norm/scale"] == 1).all()
    # Positions begin with the values that they had for good.
    table = sincos_2d(Grid(4, 4, 2), 24)
    np.testing.assert_allclose(got["encoder/pos_embed"][1:], table, atol=1e-6)
    assert (got["encoder/pos_embed"][0] == 0).all()
    assert f"{runs / 'mae'}, step 2: {len(taken) + 1} parameters taken" in account
    assert "new: head/linear (2); not taken: decoder/" in account
    assert account.endswith("; in both, but made anew: encoder/norm (2)")
    # The config says what the network is, and needs the other run no more.
    encoder = tree.objective.encoder
    assert (encoder.width, encoder.depth, tree.objective.mean) == (24, 2, (0.25,))
    assert (encoder.norm, encoder.positions) == ("pooled", "learned")


@pytest.mark.parametrize("name, pool", [("mae", "cls"), ("cmae", "avg")])
def test_a_probe_reads_the_feature_of_its_run(runs, name, pool):
    source = given(runs / name)
    got, _, _, tree = begin("probe", runs / name)
    assert tree.objective.pool == pool
    for path in got:
        if path.startswith("encoder/"):
            np.testing.assert_array_equal(got[path], source[path], path)


def test_a_probe_of_a_classifier_reads_its_norm_and_positions(runs):
    source = given(runs / "supervised")
    got, _, _, tree = begin("probe", runs / "supervised")
    assert tree.objective.pool == "avg" and tree.objective.encoder.norm == "pooled"
    for path in ("encoder/norm/scale", "encoder/pos_embed"):
        np.testing.assert_array_equal(got[path], source[path])
    assert (got["head/linear/kernel"] != source["head/linear/kernel"]).any()


def test_the_teacher_is_another_network(runs):
    student, teacher = (given(runs / "cmae", part) for part in ("params", "teacher"))
    got, *_ = begin("probe", runs / "cmae", init_from__weights="teacher")
    np.testing.assert_array_equal(got[QKV], teacher[QKV])
    assert (student[QKV] != teacher[QKV]).any()


def test_a_new_teacher_is_made_of_what_was_taken(runs):
    got, state, *_ = begin("cmae", runs / "mae")
    np.testing.assert_array_equal(got[QKV], given(runs / "mae")[QKV])
    teacher = leaves(states.unstack_blocks(state.teacher))
    np.testing.assert_array_equal(teacher[QKV], got[QKV])


def test_another_size_resizes_the_positions(runs):
    got, *_ = begin("supervised", runs / "mae", data__image_size=(12, 8))
    want = resized(sincos_2d(Grid(4, 4, 2), 24), (4, 4), (6, 4))
    assert got["encoder/pos_embed"].shape == (25, 24)
    np.testing.assert_allclose(got["encoder/pos_embed"][1:], want, atol=1e-6)
    got, *_ = begin("supervised", runs / "supervised", data__image_size=(12, 8))
    source = given(runs / "supervised")["encoder/pos_embed"]
    want = resized(source[1:].astype(np.float64), (4, 4), (6, 4))
    np.testing.assert_allclose(got["encoder/pos_embed"][1:], want, atol=1e-6)
    np.testing.assert_array_equal(got["encoder/pos_embed"][0], source[0])


def test_parts_are_what_is_taken(runs):
    source = given(runs / "supervised")
    head = "head/linear/kernel"
    got, *_ = begin("supervised", runs / "supervised", seed=5)
    for path in ("encoder/pos_embed", "encoder/norm/scale"):
        np.testing.assert_array_equal(got[path], source[path])
    assert (got[head] != source[head]).any()
    got, *_ = begin(
        "supervised", runs / "supervised", init_from__parts=("encoder", "head")
    )
    np.testing.assert_array_equal(got[head], source[head])
    got, *_ = begin(
        "supervised", runs / "supervised", init_from__parts=("encoder/embed",)
    )
    path = "encoder/embed/kernel"
    np.testing.assert_array_equal(got[path], source[path])
    assert (got[QKV] != source[QKV]).any()


def test_a_run_that_goes_on_does_not_need_the_other(runs, tmp_path):
    tree = tree_of("supervised", init_from__run=str(runs / "mae"))
    rundir.write_config(tmp_path, warmstart.adopt(tree))
    tree.init_from.run = "gone"
    assert warmstart.adopt(tree, tmp_path).objective.encoder.width == 24
    with pytest.raises(config.ConfigError, match="run='gone': no config.json there"):
        warmstart.adopt(tree)


def test_every_objective_can_begin_with_another(runs):
    for name in TINY:
        tree = tree_of(name, init_from__run=str(runs / "mae"))
        adopted = warmstart.adopt(tree)
        encoder = adopted.objective.encoder
        assert (encoder.width, encoder.depth, adopted.objective.mean) == (
            24,
            2,
            (0.25,),
        )
        assert tree.objective.encoder.width == 16  # the given one is left alone


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(init_from__step=7), "no checkpoint 7 under"),
        (dict(init_from__parts=("tail",)), "want a part of both"),
        (dict(init_from__weights="teacher"), "has no teacher; want 'trained'"),
    ],
)
def test_what_is_not_there_is_refused(runs, changes, message):
    with pytest.raises(config.ConfigError, match=message):
        begin("supervised", runs / "mae", **changes)


def test_a_head_of_another_size_is_refused(runs):
    changes = dict(objective__classes=12)
    begin("supervised", runs / "supervised", **changes)
    with pytest.raises(config.ConfigError, match=r"head/linear/\w+ is \[.*10\] there"):
        parts = dict(init_from__parts=("encoder", "head"))
        begin("supervised", runs / "supervised", **changes, **parts)


def test_learned_positions_need_a_place(runs):
    with pytest.raises(config.ConfigError, match="positions='fixed': .* learned ones"):
        begin("mae", runs / "supervised")


def test_an_evaluation_is_no_run_to_begin_with(tmp_path):
    tree = config.experiment("eval")
    tree.run = "runs/x"
    (tmp_path / "config.json").write_text(config.dumps(tree))
    with pytest.raises(config.ConfigError, match="job 'eval'; want a training run"):
        warmstart.adopt(tree_of("supervised", init_from__run=str(tmp_path)))


@pytest.mark.parametrize("teacher", [False, True])
def test_evaluations_read_what_they_are_told(runs, teacher):
    run, _ = evaluate.load(runs / "cmae", teacher=teacher)
    want = given(runs / "cmae", "teacher" if teacher else "params")
    got = leaves(run.params)
    assert "predictor/fc1/kernel" in got
    for path in want:
        np.testing.assert_array_equal(got[path], want[path], path)
    assert run.name == ("cmae, teacher" if teacher else "cmae")
    with pytest.raises(config.ConfigError, match="weights='teacher': .* has none"):
        evaluate.load(runs / "mae", teacher=True)


def test_evaluations_read_running_statistics(tmp_path):
    save("probe", tmp_path / "probe")
    run, _ = evaluate.load(tmp_path / "probe")
    want = given(tmp_path / "probe", "stats")
    assert run.stats.keys() == want.keys() == {"mean", "variance"}
    np.testing.assert_array_equal(run.stats["variance"], want["variance"])
