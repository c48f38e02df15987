# SPDX-License-Identifier: Apache-2.0
"""A run that begins with the parameters of another: what is taken, what is refused."""

import json

import jax
import numpy as np
import pytest
from tiny import TINY, leaves, tree_of

from mim_jax import config, evaluate, train, warmstart
from mim_jax.checkpoint import read_parts
from mim_jax.ops.patches import Grid
from mim_jax.ops.posembed import resized, sincos_2d


def run(name: str, workdir, **changes):
    """A run of two steps; the parameters that it has then, and its config."""
    quiet = dict(log__tensorboard=False, log__progress="none", steps=2)
    tree = tree_of(name, **(quiet | changes))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        train.run(tree, workdir)
    _, found = read_parts(workdir, parts=("params", "teacher", "stats"))
    return leaves(found["params"]), found


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Run directories of two steps of MAE and C-MAE, encoders of other sizes."""
    folder = tmp_path_factory.mktemp("pretrained")
    for name in ("mae", "cmae"):
        other = dict(objective__encoder__width=24, objective__mean=(0.25,))
        run(name, folder / name, **other)
    return folder


@pytest.mark.parametrize("scan", [False, True])
def test_finetuning_begins_with_the_encoder(pretrained, tmp_path, scan, capsys):
    source = leaves(read_parts(pretrained / "mae")[1]["params"])
    # A rate of almost zero: after two steps the parameters are the first ones.
    got, _ = run(
        "supervised",
        tmp_path,
        init_from__run=str(pretrained / "mae"),
        optim__base_lr=1e-9,
        optim__decay="kernels",
        optim__weight_decay=0.0,
        scan=scan,
        objective__encoder__depth=1,  # the run decides
    )
    taken = {
        path
        for path in got
        if path in source
        and got[path].shape == source[path].shape
        and np.allclose(got[path], source[path], atol=1e-6)
    }
    encoder = {path for path in source if path.startswith("encoder/")}
    assert taken - {"encoder/norm/bias", "encoder/norm/scale"} == encoder - {
        "encoder/norm/bias",
        "encoder/norm/scale",
    }
    # The norm after pooling is another one than that of tokens.
    np.testing.assert_allclose(got["encoder/norm/scale"], 1, atol=1e-6)
    assert not np.allclose(source["encoder/norm/scale"], 1, atol=1e-3)
    table = sincos_2d(Grid(4, 4, 2), 24)
    np.testing.assert_allclose(got["encoder/pos_embed"][1:], table, atol=1e-6)
    np.testing.assert_allclose(got["encoder/pos_embed"][0], 0, atol=1e-6)
    out = capsys.readouterr().out
    assert "began with" in out and "new: encoder/norm (2), encoder/pos_embed" not in out
    assert "not taken: decoder/" in out
    # The saved config says what the network is, and needs the other run no more.
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["objective"]["encoder"]["width"] == 24
    assert saved["objective"]["encoder"]["depth"] == 2
    assert saved["objective"]["mean"] == [0.25]
    assert saved["objective"]["encoder"]["norm"] == "pooled"
    loaded, _ = evaluate.load(tmp_path)
    assert loaded.objective.encoder.width == 24


@pytest.mark.parametrize("name, pool", [("mae", "cls"), ("cmae", "avg")])
def test_a_probe_reads_the_feature_of_its_run(pretrained, tmp_path, name, pool):
    source = leaves(read_parts(pretrained / name)[1]["params"])
    got, found = run("probe", tmp_path, init_from__run=str(pretrained / name))
    loaded, _ = evaluate.load(tmp_path)
    assert loaded.objective.pool == pool == loaded.objective.feature
    for path in got:
        if path.startswith("encoder/"):
            np.testing.assert_array_equal(got[path], source[path])
    assert loaded.stats.keys() == {"mean", "variance"}
    np.testing.assert_array_equal(loaded.stats["mean"], found["stats"]["mean"])
    assert np.abs(loaded.stats["mean"]).max() > 0


def test_the_teacher_is_another_network(pretrained, tmp_path):
    _, found = read_parts(pretrained / "cmae", parts=("params", "teacher"))
    student, teacher = leaves(found["params"]), leaves(found["teacher"])
    got, _ = run(
        "probe",
        tmp_path,
        init_from__run=str(pretrained / "cmae"),
        init_from__weights="teacher",
    )
    path = "encoder/block00/attn/qkv/kernel"
    np.testing.assert_array_equal(got[path], teacher[path])
    assert (student[path] != teacher[path]).any()


def test_another_size_resizes_the_positions(pretrained, tmp_path):
    got, _ = run(
        "supervised",
        tmp_path,
        init_from__run=str(pretrained / "mae"),
        optim__base_lr=1e-9,
        data__image_size=(12, 8),
    )
    table = sincos_2d(Grid(4, 4, 2), 24)
    want = resized(table, (4, 4), (6, 4))
    assert got["encoder/pos_embed"].shape == (25, 24)
    np.testing.assert_allclose(got["encoder/pos_embed"][1:], want, atol=1e-5)


def test_learned_positions_are_taken(tmp_path):
    first, _ = run("supervised", tmp_path / "first", optim__base_lr=0.5)
    got, _ = run(
        "supervised",
        tmp_path / "second",
        init_from__run=str(tmp_path / "first"),
        optim__base_lr=1e-9,
        seed=5,
    )
    for path in ("encoder/pos_embed", "encoder/norm/scale"):
        np.testing.assert_allclose(got[path], first[path], atol=1e-5, err_msg=path)
    head = "head/linear/kernel"
    assert not np.allclose(got[head], first[head], atol=1e-3)
    third, _ = run(
        "supervised",
        tmp_path / "third",
        init_from__run=str(tmp_path / "first"),
        init_from__parts=("encoder", "head"),
        optim__base_lr=1e-9,
    )
    np.testing.assert_allclose(third[head], first[head], atol=1e-5)


def test_a_run_that_goes_on_does_not_need_the_other(pretrained, tmp_path):
    begun = dict(init_from__run=str(pretrained / "mae"))
    run("supervised", tmp_path, stop_after=1, **begun)
    saved = tree_of("supervised", steps=2, **begun)
    hidden = pretrained.parent / "hidden"
    (pretrained / "mae").rename(hidden)
    try:
        run("supervised", tmp_path, **begun)
        assert warmstart.adopt(saved, tmp_path).objective.encoder.width == 24
        with pytest.raises(config.ConfigError, match="no config.json there"):
            warmstart.adopt(saved)
    finally:
        hidden.rename(pretrained / "mae")


def test_every_objective_can_begin_with_another(pretrained):
    for name in TINY:
        tree = tree_of(name, init_from__run=str(pretrained / "mae"))
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
        (dict(init_from__run="nowhere"), "run='nowhere': no config.json there"),
        (dict(init_from__step=7), "no checkpoint 7 under"),
        (dict(init_from__parts=("tail",)), "want a part of both"),
        (dict(init_from__weights="teacher"), "has no teacher; want 'trained'"),
    ],
)
def test_what_cannot_be_is_refused(pretrained, tmp_path, changes, message):
    changes = dict(init_from__run=str(pretrained / "mae")) | changes
    with pytest.raises(config.ConfigError, match=message):
        run("supervised", tmp_path, **changes)


def test_a_head_of_another_size_is_refused(tmp_path):
    run("supervised", tmp_path / "first")
    changes = dict(init_from__run=str(tmp_path / "first"), objective__classes=12)
    run("supervised", tmp_path / "second", **changes)
    with pytest.raises(config.ConfigError, match=r"head/linear/\w+ is \[.*10\] there"):
        parts = dict(init_from__parts=("encoder", "head"))
        run("supervised", tmp_path / "third", **changes, **parts)


def test_learned_positions_need_a_place(tmp_path):
    run("supervised", tmp_path / "first")
    with pytest.raises(config.ConfigError, match="positions='fixed': .* learned ones"):
        run("mae", tmp_path / "second", init_from__run=str(tmp_path / "first"))
