# SPDX-License-Identifier: Apache-2.0
"""The norms that a step logs: those of NumPy on the states, at no bit's cost."""

import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mim_jax import optim, train

# XLA as users run it: tests turn these off, and fusing is what might change a bit.
AS_USERS = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
}
# Later versions have no other emitters, and refuse the option.
if importlib.metadata.version("jaxlib") < "0.11":
    AS_USERS["xla_cpu_use_fusion_emitters"] = True


def length(tree) -> float:
    leaves = tiny.leaves(tree).values()
    return float(np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in leaves)))


def gap(one, other):
    """Of the leaves of `other`, which `one` has, too."""
    ours, theirs = tiny.leaves(one), tiny.leaves(other)
    return {name: ours[name].astype(np.float64) - leaf for name, leaf in theirs.items()}


@pytest.mark.parametrize("name", ["mae", "cmae"])
def test_norms_are_those_of_the_states(name):
    before = tiny.first_state(name)
    after, found = tiny.one_step(name, tiny.spread_plan(name))
    want = {
        "grad_norm": length(tiny.gradients(after)),
        "param_norm": length(after.params),
        "update_ratio": length(gap(after.params, before.params)) / length(after.params),
    }
    if after.teacher is not None:
        apart = length(gap(after.params, after.teacher))
        want["teacher_distance"] = apart / length(after.teacher)
    names = {"loss", "ok", *tiny.spread_plan(name).settings.objective.reads}
    assert found.keys() - names == want.keys()
    assert ("teacher_distance" in want) == (name == "cmae")
    for key, value in want.items():
        assert found[key] == pytest.approx(value, rel=1e-3), key
        assert value > 0


def test_the_teacher_may_be_a_part_of_the_parameters():
    params = {"a": {"w": jnp.array([3.0, 4.0])}, "b": jnp.array([100.0])}
    teacher = {"a": {"w": jnp.array([0.0, 8.0])}}
    found = optim.norms(jnp.float32(2), jnp.float32(5), params, teacher)
    assert found["grad_norm"] == 2
    assert float(found["param_norm"]) == pytest.approx(10025**0.5)
    assert float(found["update_ratio"]) == pytest.approx(5 / 10025**0.5)
    assert float(found["teacher_distance"]) == pytest.approx(5 / 8)


SLOW = [
    pytest.param(*one, marks=pytest.mark.slow)
    for one in [("mae", False), ("cmae", True), ("cmae", False)]
]


@pytest.mark.parametrize("name, branch", [("mae", True), *SLOW])
def test_norms_change_no_bit_of_the_state(name, branch, monkeypatch):
    plan = tiny.plan_of(name)

    def three_steps():
        step = jax.jit(
            lambda state, batch: train.train_step(
                state, batch, objective=plan.objective, tx=plan.tx, branch=branch
            )
        )
        state, batch = tiny.place(name, plan), tiny.batch_for(name, plan)
        with jax.numpy_dtype_promotion("standard"):
            compiled = step.lower(state, batch).compile(compiler_options=AS_USERS)
        for _ in range(3):
            state, values = compiled(state, batch)
        return tiny.bits(state), values

    with_norms, values = three_steps()
    assert "update_ratio" in values
    monkeypatch.setattr(optim, "norms", lambda *_: {})
    monkeypatch.setattr(train, "norm", lambda tree: jnp.float32(0))
    without, values = three_steps()
    assert values.keys() == {"loss", "ok"}
    assert with_norms == without


def test_one_bad_number_among_the_gradients_is_noticed():
    for bad in (np.nan, np.inf, -np.inf):
        tree = {"a": jnp.ones(3), "b": jnp.asarray([0.0, bad])}
        assert not jnp.isfinite(train.norm(tree))
    assert jnp.isfinite(train.norm({"a": jnp.ones(3), "b": [jnp.zeros(())]}))
