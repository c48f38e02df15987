# SPDX-License-Identifier: Apache-2.0
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.ops.ema import EMA

STEPS = 50


def momenta(schedule, base=0.9):
    """The momentum of each update, after 1 .. STEPS steps."""
    if schedule == "constant":
        return [base] * STEPS
    return [
        1 - (1 - base) * (1 + math.cos(math.pi * s / STEPS)) / 2
        for s in range(1, STEPS + 1)
    ]


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_teacher_is_a_weighted_mean_of_all_students(schedule):
    ema = EMA(base=0.9, schedule=schedule)
    random = np.random.RandomState(0)
    walk = np.cumsum(random.standard_normal((STEPS + 1, 4)), axis=0)
    update = jax.jit(lambda old, new, done: ema.update(old, new, done, STEPS))
    teacher = ema.update(None, {"a": jnp.asarray(walk[0], jnp.float32)}, 0, STEPS)
    np.testing.assert_array_equal(teacher["a"], walk[0].astype(np.float32))
    for step in range(1, STEPS + 1):
        student = {"a": jnp.asarray(walk[step], jnp.float32)}
        teacher = update(teacher, student, jnp.asarray(step, jnp.int32))
    # Student i counts (1 - m_i) m_(i+1) .. m_S; the first one m_1 .. m_S.
    m = momenta(schedule)
    shares = [math.prod(m)]
    shares += [(1 - m[i]) * math.prod(m[i + 1 :]) for i in range(STEPS)]
    assert math.isclose(sum(shares), 1)
    np.testing.assert_allclose(teacher["a"], shares @ walk, rtol=1e-5, atol=1e-5)


def test_cosine_starts_at_the_base_and_ends_at_one():
    ema = EMA(base=0.9, schedule="cosine")
    assert math.isclose(ema.share(0, 10), 0.1, rel_tol=1e-6)
    assert math.isclose(ema.share(5, 10), 0.05, rel_tol=1e-6)
    assert ema.share(10, 10) == 0
    old, new = {"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([7.0, -3.0])}
    np.testing.assert_array_equal(ema.update(old, new, 10, 10)["a"], old["a"])


def test_the_ends_of_the_range():
    old, new = {"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([7.0, -3.0])}
    np.testing.assert_array_equal(EMA(base=1.0).update(old, new, 3, 10)["a"], old["a"])
    np.testing.assert_array_equal(EMA(base=0.0).update(old, new, 3, 10)["a"], new["a"])
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"base={wrong}: want 0 <= base <= 1"):
            EMA(base=wrong)


def test_leaves_keep_their_dtype():
    tree = {"a": jnp.ones(2, jnp.bfloat16), "b": {"c": jnp.ones(3, jnp.float32)}}
    new = EMA().update(tree, tree, 1, 10)
    assert jax.tree.map(jnp.result_type, new) == jax.tree.map(jnp.result_type, tree)
