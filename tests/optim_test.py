# SPDX-License-Identifier: Apache-2.0
"""Schedules and the steps around Adam, each against its closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import leaves

from mim_jax import state as states
from mim_jax.optim import LARS, AdamW, Optimiser
from mim_jax.sharding import path_name


def tree() -> dict:
    """Parameters of every kind: kernels, biases, a token; two blocks."""
    rng = np.random.default_rng(0)

    def dense():
        return {
            "kernel": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=2), jnp.float32),
        }

    return {
        "encoder": {
            "block00": {"fc1": dense()},
            "block01": {"fc1": dense()},
            "embed": dense(),
            "embedding": dense(),  # a longer name, another leaf
            "cls_token": jnp.ones((1, 1, 3)),
        },
        "head": dense(),
    }


def steps_without_gradient(tx, params, count: int):
    """Parameters after each of some steps whose gradient is zero, per block."""
    opt_state, seen = tx.init(params), []
    for _ in range(count):
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, opt_state = tx.update(zeros, opt_state, params)
        params = optax.apply_updates(params, updates)
        seen.append(leaves(states.unstack_blocks(params)))
    return seen


# The learning rate.


def test_the_rate_ends_at_its_last_value():
    rate = AdamW(base_lr=1.0, warmup_epochs=20.0, final_lr=0.3).schedule(
        512, 100.0, 1000
    )
    for at in (rate, lambda step: rate(jnp.asarray(step))):
        assert float(at(0)) == 0  # the warm-up is from 0 all the same
        np.testing.assert_allclose(float(at(200)), 2, rtol=1e-6)
        np.testing.assert_allclose(float(at(600)), 0.3 + 1.7 / 2, rtol=1e-5)
        # Not scaled by the batch, as the peak is.
        np.testing.assert_allclose(float(at(1000)), 0.3, rtol=1e-5)


# Clipping.


@pytest.mark.parametrize("clip", [None, 1.0, 1e3])
def test_clipping_is_by_the_norm_of_all_gradients_together(clip):
    # With a large epsilon Adam keeps the size of a gradient.
    settings = AdamW(b1=0.5, b2=0.5, eps=1.0, weight_decay=0.0, clip=clip)
    tx = settings.build(lambda step: 0.1)
    rng = np.random.default_rng(1)
    p = {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), p)
    opt_state = tx.init(params)
    m = {name: np.zeros_like(x) for name, x in p.items()}
    v = {name: np.zeros_like(x) for name, x in p.items()}
    for t, size in enumerate((5.0, 0.1, 2.0), 1):  # one of them is below the norm of 1
        g = {name: size * rng.normal(size=x.shape) for name, x in p.items()}
        grads = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), g)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        assert (norm > 1) == (size > 1)
        share = 1.0 if clip is None else min(1.0, clip / norm)
        for name in p:
            m[name] = 0.5 * m[name] + 0.5 * share * g[name]
            v[name] = 0.5 * v[name] + 0.5 * (share * g[name]) ** 2
            step = m[name] / (1 - 0.5**t) / (np.sqrt(v[name] / (1 - 0.5**t)) + 1)
            p[name] = p[name] - 0.1 * step
            np.testing.assert_allclose(params[name], p[name], rtol=1e-5)


# Weight decay.


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_what_decays(scan, decay):
    params = states.stack_blocks(tree()) if scan else tree()
    tx = AdamW(weight_decay=0.5, decay=decay).build(lambda step: 0.1)
    (after,) = steps_without_gradient(tx, params, 1)
    for path, leaf in leaves(tree()).items():
        spared = decay == "matrices" and path.endswith("bias")
        want = leaf * (1.0 if spared else 0.95)
        np.testing.assert_allclose(after[path], want, rtol=1e-6, err_msg=path)


def test_weight_decay_goes_to_its_last_value_as_half_a_cosine():
    settings = AdamW(weight_decay=0.1, final_weight_decay=0.9, decay="all")
    rates = [0.1, 0.2, 0.05, 0.1]
    tx = settings.build(lambda step: jnp.asarray(rates)[step], total=4)
    want = leaves(tree())
    for t, after in enumerate(steps_without_gradient(tx, tree(), 4)):
        weight = 0.9 - 0.8 * 0.5 * (1 + np.cos(np.pi * t / 4))
        want = {path: leaf * (1 - rates[t] * weight) for path, leaf in want.items()}
        for path, leaf in want.items():
            np.testing.assert_allclose(after[path], leaf, rtol=1e-5, err_msg=path)


def test_weight_decay_that_changes_spares_the_same_leaves():
    tx = AdamW(weight_decay=0.1, final_weight_decay=0.9).build(lambda step: 0.1, 4)
    *_, after = steps_without_gradient(tx, tree(), 2)
    for path, leaf in leaves(tree()).items():
        assert (after[path] == leaf).all() == path.endswith("bias"), path


# What is frozen.


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
    "frozen", [("encoder/embed",), ("head/bias", "encoder"), ()], ids=str
)
def test_frozen_parameters_keep_their_values(scan, frozen):
    # Against gradients and weight decay both.
    params = states.stack_blocks(tree()) if scan else tree()
    tx = AdamW(weight_decay=0.5, decay="all").build(lambda step: 0.1, 4, frozen)
    opt_state, first = tx.init(params), leaves(tree())
    for _ in range(3):
        grads = jax.tree.map(jnp.ones_like, params)
        updates, opt_state = jax.jit(tx.update)(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    after = leaves(states.unstack_blocks(params))
    same = {path for path, leaf in first.items() if (after[path] == leaf).all()}
    want = {
        path
        for path in first
        if any(path == one or path.startswith(one + "/") for one in frozen)
    }
    assert same == want
    assert all((after[p] != first[p]).all() for p in first.keys() - want)


# What begins late.


def released(start, grads, *, first, rates, decays, b1, b2, eps):
    """AdamW as PyTorch runs it on a parameter whose gradient is None before the step
    `first`: such a step is skipped whole, and the parameter's own count begins at its
    first gradient. Float64."""
    value, mean, square, count = np.asarray(start, np.float64), 0.0, 0.0, 0
    for step, (grad, rate, decay) in enumerate(zip(grads, rates, decays, strict=True)):
        if step >= first:
            count += 1
            value = value * (1 - rate * decay)
            mean = b1 * mean + (1 - b1) * grad
            square = b2 * square + (1 - b2) * grad**2
            found = np.sqrt(square / (1 - b2**count)) + eps
            value = value - rate * (mean / (1 - b1**count)) / found
        yield value


@pytest.mark.parametrize("first", [1, 4, 9])
@pytest.mark.parametrize("final", [None, 0.9], ids=["constant", "cosine"])
def test_a_late_parameter_begins_as_if_it_had_never_been_seen(first, final):
    count, late = 9, "head/kernel"
    rng = np.random.default_rng(3)
    rates = np.linspace(0.05, 0.2, count)
    part = 0.5 * (1 + np.cos(np.pi * np.arange(count) / count))
    decays = np.full(count, 0.1) if final is None else 0.9 - 0.8 * part
    settings = AdamW(
        b1=0.9,
        b2=0.999,
        weight_decay=0.1,
        final_weight_decay=final,
        decay="all",
        eps=1e-3,
    )
    tx = settings.build(
        lambda step: jnp.asarray(rates, jnp.float32)[step], count, (), {late: first}
    )
    params = tree()
    grads = {p: rng.normal(size=(count, *x.shape)) for p, x in leaves(params).items()}
    grads[late][:first] = 0  # the loss gives no gradient before
    steps = {
        path: released(
            leaf,
            grads[path],
            first=first if path == late else 0,
            rates=rates,
            decays=decays,
            b1=0.9,
            b2=0.999,
            eps=1e-3,
        )
        for path, leaf in leaves(params).items()
    }
    opt_state, update = tx.init(params), jax.jit(tx.update)
    for step in range(count):
        given = jax.tree_util.tree_map_with_path(
            lambda path, x: jnp.asarray(grads[path_name(path)][step], jnp.float32),  # noqa: B023
            params,
        )
        updates, opt_state = update(given, opt_state, params)
        params = optax.apply_updates(params, updates)
        for path, leaf in leaves(params).items():
            want = next(steps[path])
            np.testing.assert_allclose(leaf, want, rtol=2e-5, atol=2e-5, err_msg=path)


def test_what_begins_late_has_the_state_of_what_does_not():
    """So checkpoints that were written before parameters could begin late are read."""
    settings = AdamW(final_weight_decay=0.4, clip=0.3)
    plain = settings.build(lambda step: 0.1, 4).init(tree())
    late = settings.build(lambda step: 0.1, 4, (), {"head/kernel": 2}).init(tree())
    assert jax.tree.structure(plain) == jax.tree.structure(late)


def test_lars_begins_late_unless_it_decays():
    late = {"head/kernel": 2}
    tx = LARS(trust=0.1).build(lambda step: 0.1, 4, (), late)
    fresh = LARS(trust=0.1).build(lambda step: 0.1)
    params, still = tree(), jax.tree.map(jnp.zeros_like, tree())
    grads = jax.tree.map(jnp.ones_like, params)
    _, opt_state = tx.update(still, tx.init(params), params)
    updates, _ = tx.update(grads, opt_state, params)
    want, _ = fresh.update(grads, fresh.init(params), params)
    for path, leaf in leaves(updates).items():
        np.testing.assert_allclose(leaf, leaves(want)[path], rtol=1e-6, err_msg=path)
    with pytest.raises(ValueError, match="optim.weight_decay=0.1: LARS .* head/kernel"):
        LARS(weight_decay=0.1).build(lambda step: 0.1, 4, (), late)


def test_an_optimiser_that_does_not_know_late_parameters_says_so():
    class Other(AdamW):
        late_steps = Optimiser.late_steps

    with pytest.raises(
        ValueError, match="head/kernel begin to learn .* Other .*=adamw"
    ):
        Other().build(lambda step: 0.1, 4, (), {"head/kernel": 2})


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(final_lr=-1.0), "final_lr=-1.0: want 0 <= final_lr"),
        (dict(final_weight_decay=-0.1), "final_weight_decay=-0.1: want 0 <= final_w"),
        (dict(clip=0.0), "clip=0.0: want 0 < clip"),
        (dict(clip=-1.0), "clip=-1.0: want 0 < clip"),
        (dict(clip=float("nan")), "clip=nan: want 0 < clip"),
    ],
)
def test_settings_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        AdamW(**fields)


def test_the_rate_drops_to_a_tenth_after_shares_of_the_run():
    optimiser = AdamW(base_lr=4e-4, warmup_epochs=1.0, drops=(8 / 9, 26 / 27))
    rate = optimiser.schedule(batch_size=64, epochs=10.0, total=2700)
    want = {0: 0, 135: 0.5, 270: 1, 2399: 1, 2400: 0.1, 2599: 0.1, 2600: 0.01}
    for step, share in want.items():
        assert float(rate(step)) == pytest.approx(share * 1e-4, rel=1e-5), step
        assert float(jax.jit(rate)(step)) == pytest.approx(share * 1e-4, rel=1e-5)
    with pytest.raises(ValueError, match="warmup_epochs"):
        optimiser.schedule(batch_size=64, epochs=1.0, total=2700)
