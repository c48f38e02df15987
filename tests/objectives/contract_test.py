# SPDX-License-Identifier: Apache-2.0
"""What every objective promises, on the rows of `tiny.TINY`: one for each of them.

What is compiled is shared: one step on one device ("plain"), one on eight devices with
everything that may not matter turned on ("spread"), one in bfloat16, and one in
micro-batches where those are allowed. The slow part takes what may not matter apart.
"""

import dataclasses
import functools
import itertools
import json

import jax
import numpy as np
import pytest
from tiny import (
    STEPS,
    TINY,
    batch_for,
    below,
    bits,
    first_state,
    gradients,
    leaves,
    one_step,
    place,
    plan_of,
    share,
    spread_plan,
    step_of,
    tree_of,
)

from mim_jax import config, train
from mim_jax import state as states
from mim_jax.objectives import OBJECTIVES
from mim_jax.plan import Plan
from mim_jax.run.checkpoint import Checkpointer
from mim_jax.sharding import Mesh


def those_of(names: set[str]):
    """All objectives; those that are not named are slow."""
    return pytest.mark.parametrize(
        "name",
        [
            name if name in names else pytest.param(name, marks=pytest.mark.slow)
            for name in TINY
        ],
    )


# What is compiled takes the time: what the papers do not study waits for the night.
each = those_of(TINY.keys() - {"beit", "dino", "detection"})
some = those_of({"mae", "rmae", "cmae", "supervised"})


def test_every_objective_has_a_row():
    for name in TINY.keys() - {"encoder"}:  # which has no loss
        assert name in TINY, f"give {name!r} a row in TINY of tests/tiny.py"
    assert TINY.keys() <= OBJECTIVES.keys()


@functools.cache
def plain(name: str):
    """(first state, state after a step, its metrics, gradients) on one device."""
    after, metrics = one_step(name, plan_of(name))
    return first_state(name), after, metrics, gradients(after)


def part_scales(grads: dict[str, np.ndarray]) -> dict[str, float]:
    """The largest gradient in the network of each leaf: `encoder`, `decoder`, ..."""
    parts: dict[str, float] = {}
    for path, leaf in grads.items():
        part = path.split("/")[0]
        parts[part] = max(parts.get(part, 0), np.abs(leaf).max())
    return {path: parts[path.split("/")[0]] for path in grads}


def check_same(name: str, plan: Plan, loss_tolerance=1e-5, tolerance=1e-4):
    """One step of a plan has loss, statistics and gradients of the plain one."""
    after, metrics = one_step(name, plan)
    _, alone, want, wanted = plain(name)
    assert metrics["ok"] and int(after.step) == 1
    for value in want:
        # Adam's first update is the sign of a gradient, also of one that is rounding.
        rough = value in ("update_ratio", "teacher_distance")
        rtol = max(loss_tolerance, 1e-3) if rough else loss_tolerance
        np.testing.assert_allclose(
            metrics[value], want[value], rtol=rtol, err_msg=value
        )
    for path, leaf in leaves(alone.stats).items():
        scale = np.abs(leaf).max()
        assert np.abs(leaves(after.stats)[path] - leaf).max() <= 1e-5 * scale, path
    got, scales = gradients(after), part_scales(wanted)
    assert got.keys() == wanted.keys()
    for path, leaf in wanted.items():
        # What has no gradient has its network's rounding errors.
        scale = scales[path] if path in TINY[name].still else np.abs(leaf).max()
        error = np.abs(got[path] - leaf).max()
        assert error <= tolerance * scale, f"{path}: {error} of {scale}"


# One step.


@each
def test_the_loss_is_a_number(name):
    _, after, metrics, _ = plain(name)
    assert metrics["loss"].shape == () and metrics["loss"].dtype == np.float32
    assert np.isfinite(metrics["loss"]) and metrics["ok"]
    assert {leaf.dtype for leaf in leaves(after.params).values()} == {np.dtype("f4")}


@each
def test_a_step_is_a_function_of_its_arguments(name):
    _, after, metrics, _ = plain(name)
    again, same = one_step(name, plan_of(name))
    assert bits(again) == bits(after) and bits(same) == bits(metrics)
    # And what it draws comes from the key: nothing was drawn while tracing.
    plan = plan_of(name)
    state = dataclasses.replace(place(name, plan), key=states.run_key(1))
    _, other = step_of(plan)(state, batch_for(name, plan))
    assert (float(other["loss"]) != float(metrics["loss"])) == TINY[name].draws


@each
def test_every_parameter_learns_or_is_named(name):
    before, after, _, grads = plain(name)
    frozen = plan_of(name).settings.objective.frozen
    scales, old, new = part_scales(grads), bits(before.params), bits(after.params)
    without = {
        path for path in grads if np.abs(grads[path]).max() < 1e-6 * scales[path]
    }
    held = {path for path in old if below(path, frozen)}
    assert without - held == TINY[name].still.keys()
    assert {path for path in old if old[path] == new[path]} == held
    for path in frozen:
        assert any(below(leaf, [path]) for leaf in held), f"nothing is {path}"


@each
def test_frozen_parameters_are_so_in_a_scanned_and_spread_run_too(name):
    after, _ = one_step(name, spread_plan(name))
    old, new = bits(first_state(name).params), bits(after.params)
    frozen = plan_of(name).settings.objective.frozen
    same = {path for path in old if old[path] == new[path]}
    assert same == {path for path in old if below(path, frozen)}


@each
def test_a_teacher_is_used_and_follows_and_gets_no_gradient(name):
    before, after, metrics, _ = plain(name)
    if before.teacher is None:
        assert after.teacher is None
        return
    assert leaves(before.teacher).keys() <= leaves(before.params).keys()
    plan, first = plan_of(name), bits(before.params)
    objective = plan.settings.objective
    for path, leaf in bits(before.teacher).items():
        assert leaf == first[path]
        follows = bits(after.teacher)[path] != leaf
        assert follows != below(path, objective.frozen), path
    batch, state = batch_for(name, plan), place(name, plan)

    def loss(teacher):
        with_teacher = dataclasses.replace(state, teacher=teacher)
        keys = train.example_keys(state, len(batch["image"]))
        return objective.loss(state.params, with_teacher, batch, keys)[0]

    grads = jax.jit(jax.grad(loss))(state.teacher)
    assert all((leaf == 0).all() for leaf in leaves(grads).values())
    other = jax.tree.map(
        lambda leaf: (
            leaf + np.cos(np.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape)
        ),
        before.teacher,
    )
    moved = place(name, plan, dataclasses.replace(before, teacher=other))
    _, changed = step_of(plan)(moved, batch)
    assert abs(changed["loss"] - metrics["loss"]) > 1e-3


# What may not matter.


@each
def test_eight_devices_fsdp_scan_and_remat_change_nothing(name):
    check_same(name, spread_plan(name))


SETUPS = list(
    itertools.product(
        [(1, 1, 1), (2, 2, 1), (8, 8, 1), (8, 4, 2), (8, 2, 4)],  # devices, data, fsdp
        [False, True],
        ["none", "dots", "full"],
    )
)


@pytest.mark.slow
@pytest.mark.parametrize("mesh, scan, remat", SETUPS, ids=str)
@each
def test_no_setup_changes_anything(name, mesh, scan, remat):
    devices, data, fsdp = mesh
    changes = dict(mesh__data=data, mesh__fsdp=fsdp, scan=scan, remat=remat)
    check_same(name, plan_of(name, devices, **changes))


@each
def test_micro_batches_are_the_whole_batch_or_are_refused(name):
    plan = plan_of(name)
    if not plan.settings.objective.batch_coupled:
        check_same(name, plan_of(name, 2, accumulate=2, remat="dots"))
        return
    with pytest.raises(config.ConfigError, match="want accumulate=1, or") as caught:
        plan_of(name, 2, accumulate=2)
    assert type(plan.settings.objective).__name__ in str(caught.value)
    plan_of(name, 2, accumulate=2, accumulate_coupled=True)


@some
def test_bfloat16_is_near(name):
    plan = plan_of(name, 1, dtype="bfloat16", scan=True, remat="dots")
    after, metrics = one_step(name, plan)
    _, _, want, wanted = plain(name)
    assert metrics["ok"] and metrics["loss"].dtype == np.float32
    np.testing.assert_allclose(metrics["loss"], want["loss"], rtol=2e-2)
    assert {leaf.dtype for leaf in leaves(after.params).values()} == {np.dtype("f4")}
    got = gradients(after)
    for path in wanted.keys() - TINY[name].still.keys():
        error = np.linalg.norm(got[path] - wanted[path])
        share = error / np.linalg.norm(wanted[path])
        assert share < TINY[name].rounding, f"{path}: {share}"


# Learning.


@each
def test_the_loss_falls(name):
    plan, row = plan_of(name), TINY[name]
    state, batch, losses = place(name, plan), batch_for(name, plan), []
    for _ in range(STEPS):
        state, metrics = step_of(plan)(state, batch)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-5:]) < row.falls * np.mean(losses[:5])


# Runs, on one device: Orbax writes each shard by itself, which takes its time.
# tests/hosts_test.py and the slow part of tests/end_to_end_test.py resume on many.

RUN = dict(
    checkpoint__every=3,
    log__every=2,
    log__tensorboard=False,
    log__progress="none",
)


def run(name: str, workdir, **changes) -> None:
    tree = tree_of(name, **RUN, **changes)
    # Strict promotion is for our own code; here a whole program runs, optax included.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        train.run(tree, workdir)


def saved(name: str, workdir):
    """All of the newest checkpoint, and the lines of the log but for times."""
    plan = plan_of(name)
    with Checkpointer(workdir, plan.settings.checkpoint) as checkpointer:
        step, state, extra = checkpointer.restore(plan.abstract_state())
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    lines = [row for row in map(json.loads, lines) if "loss" in row]
    for line in lines:
        for timing in ("images_per_second", "input_wait_share"):
            line.pop(timing, None)
    return step, bits(state), extra, lines


def check_resume(name: str, folder) -> None:
    run(name, folder / "straight", stop_after=5)
    run(name, folder / "parts", stop_after=3)
    run(name, folder / "parts", stop_after=5)
    straight = saved(name, folder / "straight")
    assert straight[0] == 5 and [line["step"] for line in straight[3]] == [2, 4]
    assert straight == saved(name, folder / "parts")


# A teacher and statistics are what a state can hold besides.
@those_of({"mae", "cmae", "probe"})
def test_stop_and_resume_is_the_straight_run(name, tmp_path, monkeypatch, capsys):
    # The run is real, but for what is compiled once.
    share(monkeypatch, plan_of(name))
    build = Mesh.build
    one_device = lambda mesh, _=None: build(mesh, jax.devices()[:1])  # noqa: E731
    monkeypatch.setattr(Mesh, "build", one_device)
    monkeypatch.setattr(train.report, "measure", lambda *_: None)
    check_resume(name, tmp_path)
    assert "resumed from step 3" in capsys.readouterr().out
