# SPDX-License-Identifier: Apache-2.0
"""The one step: in micro-batches, safe from NaN, at the rate of its schedule."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from steps import (
    ROWS,
    batch_for,
    bits,
    close,
    coupled,
    devices,
    first_state,
    gradients,
    on_mesh,
    one_step,
    place,
    plan_of,
    step_of,
    tree_of,
)

from mim_jax import config, train
from mim_jax import state as states
from mim_jax.objectives.base import Aux, Objective
from mim_jax.objectives.mae import MAE
from mim_jax.optim import AdamW
from mim_jax.plan import Plan
from mim_jax.sharding import path_name

# Micro-batches.


def test_micro_batches_are_the_whole_batch_to_rounding():
    whole, whole_metrics = one_step(on_mesh(1, 1, 1))
    parts, metrics = one_step(plan_of(scan=False, accumulate=4))
    # The loss would differ by a percent if a mask or its row did.
    np.testing.assert_allclose(metrics["loss"], whole_metrics["loss"], rtol=1e-6)
    close(gradients(parts), gradients(whole), 1e-5)


@dataclasses.dataclass(frozen=True)
class Toy(Objective):
    """A weighted mean over examples: weights are pixel sums, noise is per key.

    Attributes:
        poison: an image whose first pixel is this makes the loss NaN.
        edge: the loss is finite, its gradient is not.
    """

    poison: int = -1
    edge: bool = False

    def check_shape(self, image_shape):
        pass

    def init(self, key, batch):
        size = batch["image"][0].size
        return {"w": jax.random.normal(key, (size,))}, {"count": jnp.zeros(())}

    def loss(self, params, state, batch, keys):
        images = batch["image"].reshape(len(keys), -1)
        weights = images.astype(jnp.float32).mean(axis=1)
        noise = jax.vmap(lambda key: jax.random.normal(key, (images.shape[1],)))(keys)
        errors = ((noise * params["w"][None]).sum(axis=1) - weights) ** 2
        mean = (weights * errors).sum() / weights.sum()
        bad = (images[:, 0] == self.poison).any()
        mean = jnp.where(bad, jnp.nan, mean)
        if self.edge:
            mean = mean + jnp.sqrt(jnp.abs(params["w"] * 0.0)).sum()
        metrics = {"size": (weights * weights).sum() / weights.sum()}
        stats = {"count": state.stats["count"] + 1}
        return mean, Aux(weight=weights.sum(), stats=stats, metrics=metrics)

    def teacher(self, old, params, step):
        return params if old is None else jax.tree.map(lambda p: p * 0.5, params)

    def flops(self, image_shape):
        return 1.0


def toy_step(micro_batches: int = 1, **fields):
    """(jitted step, state) of a toy objective; the state is donated."""
    objective = Toy(**fields)
    tx = AdamW().build(lambda step: 0.1)
    shape = (2, 2, 1)
    create = functools.partial(
        states.create, objective, tx, seed=0, image_shape=shape, scan=False
    )
    step = functools.partial(
        train.train_step, objective=objective, tx=tx, micro_batches=micro_batches
    )
    return jax.jit(step, donate_argnums=0), jax.jit(create)()


def toy_batch() -> dict:
    # Sums from 4 to 800: rows of a micro-batch differ in weight by far.
    images = np.arange(8, dtype=np.uint8)[:, None, None, None] ** 2 * 4 + 1
    return {"image": jnp.asarray(np.broadcast_to(images, (8, 2, 2, 1)))}


@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_unequal_weights_are_weighed(micro_batches):
    step, state = toy_step()
    whole, whole_metrics = jax.device_get(step(state, toy_batch()))
    step, state = toy_step(micro_batches)
    parts, metrics = jax.device_get(step(state, toy_batch()))
    for name in ("loss", "size"):
        np.testing.assert_allclose(metrics[name], whole_metrics[name], rtol=1e-5)
    close(gradients(parts), gradients(whole), 1e-5)


def test_a_batch_coupled_objective_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(MAE, "batch_coupled", True)
    Plan.of(tree_of(), devices(1))  # one batch is fine
    with pytest.raises(config.ConfigError) as caught:
        Plan.of(tree_of(accumulate=2), devices(1))
    assert str(caught.value) == (
        "config.accumulate=2: in the loss of MAE every image depends on the whole "
        "batch, so micro-batches would change the loss; want accumulate=1, or "
        "--config.accumulate_coupled=true to compute it per micro-batch"
    )
    Plan.of(tree_of(accumulate=2, accumulate_coupled=True), devices(1))


# What the data must offer.


@pytest.mark.parametrize(
    "name, missing, want",
    [
        ("mocov3", "image2", "data.crops=2"),
        ("dino", "image2", "data.crops=2"),
        ("dino", "local", "data.local_crops >= 1"),
    ],
)
def test_crops_that_the_data_do_not_give_are_named(name, missing, want):
    tree = coupled(name)
    tree.data.update(dict(crops=2, local_crops=1, local_size=(4, 4)))
    Plan.of(tree, devices(1))
    tree.data.update(dict(crops=1) if missing == "image2" else dict(local_crops=0))
    with pytest.raises(config.ConfigError) as caught:
        Plan.of(tree, devices(1))
    title = {"mocov3": "MoCoV3", "dino": "DINO"}[name]
    assert str(caught.value).startswith(
        f"config: data has no {missing!r}, which {title} reads; want config.{want}. "
    )


def test_every_kind_of_image_is_checked():
    tree = coupled("dino")
    tree.data.update(dict(crops=2, local_crops=1, local_size=(5, 4)))
    with pytest.raises(config.ConfigError, match="patch"):
        Plan.of(tree, devices(1))


# What is not finite.


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_a_nan_changes_no_bit_of_the_state(micro_batches):
    step, state = toy_step(micro_batches, poison=99)
    state, metrics = step(state, toy_batch())  # a good one first
    assert metrics["ok"]
    before = bits(state)
    poisoned = {"image": toy_batch()["image"].at[3, 0, 0, 0].set(99)}
    state, metrics = step(state, poisoned)
    assert not metrics["ok"] and np.isnan(metrics["loss"])
    assert bits(state) == before and int(state.step) == 1
    state, metrics = step(state, toy_batch())  # and on
    assert metrics["ok"] and int(state.step) == 2 and bits(state) != before
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_a_gradient_that_is_not_finite_counts_as_well():
    step, state = toy_step(edge=True)
    before = bits(state)
    state, metrics = step(state, toy_batch())
    assert np.isfinite(metrics["loss"]) and not metrics["ok"]
    assert bits(state) == before


def test_a_poisoned_parameter_is_noticed_in_mae():
    plan = on_mesh(1, 1, 1)
    state = place(plan)
    kernel = state.params["decoder"]["predict"]["kernel"].at[0, 0].set(jnp.inf)
    state.params["decoder"]["predict"]["kernel"] = kernel
    before = bits(state)
    state, metrics = step_of(plan)(state, batch_for(plan))
    assert not metrics["ok"] and bits(state) == before


def test_a_good_step_takes_everything_new():
    step, state = toy_step()
    before = jax.device_get(jax.tree.map(jnp.copy, (state.params, state.teacher)))
    state, _ = step(state, toy_batch())
    assert int(state.step) == 1 and float(state.stats["count"]) == 1
    assert (np.asarray(state.params["w"]) != before[0]["w"]).all()
    np.testing.assert_array_equal(state.teacher["w"], state.params["w"] * 0.5)


# Schedule.


def test_the_schedule_is_its_closed_form():
    rate = AdamW(base_lr=1.0, warmup_epochs=20.0).schedule(512, 100.0, 1000)
    cosine = [0.5 * (1 + np.cos(np.pi * x)) for x in (0.5, 799 / 800, 1.0)]
    for at in (rate, lambda step: rate(jnp.asarray(step))):  # on the host, the device
        assert float(at(0)) == 0
        np.testing.assert_allclose(float(at(50)), 2 * 50 / 200, rtol=1e-6)
        np.testing.assert_allclose(float(at(200)), 2, rtol=1e-6)
        np.testing.assert_allclose(float(at(600)), 2 * cosine[0], rtol=1e-5)
        np.testing.assert_allclose(float(at(999)), 2 * cosine[1], rtol=1e-2)
        assert float(at(1000)) == pytest.approx(2 * cosine[2], abs=1e-6)


def test_steps_keep_the_share_of_the_warm_up():
    rate = plan_of(steps=50, epochs=100.0, optim__warmup_epochs=20.0).schedule
    peak = 1.5e-4 * ROWS / 256
    np.testing.assert_allclose([rate(5), rate(10)], [peak / 2, peak], rtol=1e-6)
    assert rate(9) < rate(10) > rate(11)


def test_epochs_give_the_number_of_steps():
    assert len(plan_of().settings.data.source) == 1442
    assert plan_of(steps=None, epochs=2.5).total == 226  # ceil(2.5 * 1442 / 16)


def test_an_epoch_can_have_more_images_than_the_source():
    plan = plan_of(steps=None, epochs=2.5, epoch_images=3000)
    assert plan.total == 469  # ceil(2.5 * 3000 / 16)
    assert plan.epoch_images == 3000 and plan_of().epoch_images == 1442
    with pytest.raises(config.ConfigError, match="epoch_images=0: want 1 <= epo"):
        plan_of(steps=None, epoch_images=0)


@pytest.mark.parametrize("name", ["cmae", "dino"])
def test_objectives_know_the_length_of_the_run(name):
    tree = coupled(name)
    tree.data.update(dict(crops=2, local_crops=1, local_size=(4, 4)))
    assert Plan.of(tree, devices(1)).settings.objective.total_steps == 40
    tree.steps, tree.stop_after = None, 3  # of the whole run, wherever this part ends
    tree.epochs = 2.5
    assert Plan.of(tree, devices(1)).settings.objective.total_steps == 226


def test_the_optimiser_knows_the_length_of_the_run_and_what_is_frozen():
    tree = coupled("mocov3")
    tree.steps, tree.data.crops = 4, 2
    tree.optim.update(dict(decay="all", weight_decay=0.1, final_weight_decay=0.9))
    plan = Plan.of(tree, devices(1))
    params = {"encoder": {"embed": jnp.ones(3), "cls_token": jnp.ones(3)}}
    opt_state, want = plan.tx.init(params), 1.0
    for t in range(4):
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, opt_state = plan.tx.update(zeros, opt_state, params)
        params = optax.apply_updates(params, updates)
        decay = 0.9 - 0.8 * 0.5 * (1 + np.cos(np.pi * t / 4))
        want *= 1 - float(plan.schedule(t)) * decay
        np.testing.assert_allclose(params["encoder"]["cls_token"], want, rtol=1e-6)
        assert (params["encoder"]["embed"] == 1).all()
    assert want < 0.99


def test_accumulation_does_not_change_the_rate():
    assert plan_of(accumulate=4).schedule(3) == plan_of().schedule(3)


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="warmup_epochs=9.0: want less than the run's"):
        AdamW(warmup_epochs=9.0).schedule(256, 9.0, 100)


# Optimiser.

BLOCK = ("attn/out/kernel", "attn/qkv/kernel", "fc1/kernel", "fc2/kernel")
DECAYED = sorted(
    [
        "decoder/embed/kernel",
        "decoder/mask_token",
        "decoder/predict/kernel",
        "encoder/cls_token",
        "encoder/embed/kernel",
        *(f"decoder/block00/{name}" for name in BLOCK),
        *(f"encoder/block00/{name}" for name in BLOCK),
        *(f"encoder/block01/{name}" for name in BLOCK),
    ]
)


def names(tree, chosen) -> list[str]:
    return sorted(
        path_name(path)
        for path, leaf in jax.tree.leaves_with_path(tree)
        if chosen(leaf)
    )


@pytest.mark.parametrize("scan", [False, True])
def test_a_step_without_gradient_shrinks_kernels_and_tokens_alone(scan):
    params = jax.tree.map(jnp.ones_like, first_state().params)
    params = states.stack_blocks(params) if scan else params
    tx = AdamW(weight_decay=0.5).build(lambda step: 0.1)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    after = states.unstack_blocks(optax.apply_updates(params, updates))
    assert names(after, lambda leaf: (leaf != 1).any()) == DECAYED
    shrunk = {float(x) for leaf in jax.tree.leaves(after) for x in np.unique(leaf)}
    assert shrunk == {1.0, float(np.float32(1) - np.float32(0.05))}


def test_scan_changes_no_number_of_a_step():
    plain, metrics = one_step(on_mesh(1, 1, 1))
    looped, looped_metrics = one_step(plan_of(scan=True))
    np.testing.assert_allclose(looped_metrics["loss"], metrics["loss"], rtol=1e-6)
    close(gradients(looped), gradients(plain), 1e-5)
    assert jax.tree.structure(looped.params) == jax.tree.structure(plain.params)


def test_adamw_is_its_paper():
    # arXiv:1711.05101, algorithm 2, in float64 by hand.
    settings = AdamW(b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.2)
    rates = [0.1, 0.05, 0.2]
    tx = settings.build(lambda count: jnp.asarray(rates)[count])
    rng = np.random.default_rng(0)
    p = {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), p)
    opt_state = tx.init(params)
    m = {name: np.zeros_like(x) for name, x in p.items()}
    v = {name: np.zeros_like(x) for name, x in p.items()}
    for t, rate in enumerate(rates, 1):
        g = {name: rng.normal(size=x.shape) for name, x in p.items()}
        grads = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), g)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        for name in p:
            m[name] = 0.8 * m[name] + 0.2 * g[name]
            v[name] = 0.9 * v[name] + 0.1 * g[name] ** 2
            step = m[name] / (1 - 0.8**t) / (np.sqrt(v[name] / (1 - 0.9**t)) + 1e-3)
            decay = 0.2 * p[name] if name == "kernel" else 0
            p[name] = p[name] - rate * (step + decay)
            np.testing.assert_allclose(params[name], p[name], rtol=1e-5)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(base_lr=float("inf")), "base_lr=inf: want 0 < base_lr <= 1e+38"),
        (dict(b1=1.0), "b1=1.0: want 0 <= b1 < 1"),
        (dict(eps=0.0), "eps=0.0: want 1e-30 <= eps <= 1"),
        (
            dict(warmup_epochs=-1.0),
            "warmup_epochs=-1.0: want 0 <= warmup_epochs <= 1000000",
        ),
    ],
)
def test_settings_out_of_range(fields, message):
    with pytest.raises(ValueError) as caught:
        AdamW(**fields)
    assert str(caught.value) == message


# State.


def test_keys_are_new_at_every_step_and_in_every_row():
    _, state = toy_step()
    rows = [
        train.example_keys(dataclasses.replace(state, step=jnp.int32(step)), 4)
        for step in (0, 1, 2)
    ]
    data = np.concatenate([jax.random.key_data(keys) for keys in rows])
    assert len(np.unique(data, axis=0)) == 12
    longer = train.example_keys(state, 8)
    np.testing.assert_array_equal(
        jax.random.key_data(longer[:4]), jax.random.key_data(rows[0])
    )


def test_runs_differ_by_their_seed_alone():
    one, other = states.run_key(0), states.run_key(1)
    assert jax.random.key_impl(one) == "threefry2x32"
    assert not np.array_equal(jax.random.key_data(one), jax.random.key_data(other))
    plan = plan_of(scan=False)
    draw = functools.partial(
        states.initial, plan.settings.objective, image_shape=(8, 8, 1)
    )
    first, second = (jax.jit(functools.partial(draw, seed=s))()[0] for s in (0, 1))
    assert bits(first) == bits(first_state().params) != bits(second)


def test_stacking_is_undone_by_unstacking():
    state = first_state()
    again = states.unstack_blocks(states.stack_blocks(state))
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert bits(again) == bits(state)


# Learning.


def test_the_loss_falls():
    plan = plan_of(scan=False, optim__base_lr=0.1)
    state, batch, losses = place(plan), batch_for(plan), []
    for _ in range(40):
        state, metrics = step_of(plan)(state, batch)
        losses.append(float(metrics["loss"]))
    # Pixels have variance about 1.4; the mean of the first and the last five.
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])


def test_a_stand_in_needs_no_labels():
    tree = config.read("configs/supervised.py:source=photos")
    tree.batch_size = 8
    with pytest.raises(config.ConfigError, match="data.source has no labels"):
        Plan.of(tree, jax.devices()[:1])
    plan = Plan.of(tree, jax.devices()[:1], stand_in=True)
    assert plan.abstract_batch()["label"].shape == (8,)
