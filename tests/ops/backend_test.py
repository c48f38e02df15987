# SPDX-License-Identifier: Apache-2.0
"""Every form of a computation gives the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.ops.backend import compile_for, dense_dot, made_if, target

DOT = (((2,), (0,)), ((), ()))


def _value_and_grad(platform):
    def loss(x, kernel):
        with compile_for(platform):
            return (dense_dot(x, kernel, DOT) ** 2).mean()

    x = jax.random.normal(jax.random.key(0), (4, 7, 6))
    kernel = jax.random.normal(jax.random.key(1), (6, 5))
    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    return program(x, kernel), str(program.trace(x, kernel).jaxpr)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_merged_rows_change_nothing(platform):
    (value, grads), text = _value_and_grad("cpu")
    (other, other_grads), other_text = _value_and_grad(platform)
    np.testing.assert_allclose(value, other, rtol=1e-6)
    for a, b in zip(grads, other_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert "reshape" in text and "reshape" not in other_text


def test_the_target_is_this_machine_unless_said():
    assert target() == jax.default_backend()
    with compile_for("tpu"):
        assert target() == "tpu"
    assert target() == jax.default_backend()


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_tree_is_made_or_stays(platform):
    old = {"x": jnp.asarray([1.0, 2.0]), "key": jax.random.key(3)}

    def step(ok):
        with compile_for(platform):
            return made_if(ok, lambda: old | {"x": old["x"] / 0}, old)

    for ok, expected in [(True, [np.inf, np.inf]), (False, [1, 2])]:
        found = jax.jit(step)(jnp.asarray(ok))
        np.testing.assert_array_equal(found["x"], expected)
        assert jax.random.key_data(found["key"]).tolist() == [0, 3]
    text = str(jax.make_jaxpr(step)(jnp.asarray(True)))
    assert ("cond[" in text) == (platform == "cpu")
