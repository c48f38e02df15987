# SPDX-License-Identifier: Apache-2.0
"""What the other tests rely on is really there: strictness, and files in order."""

import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from mim_jax.maskings.random import Random
from mim_jax.ops.masking import cut, take
from mim_jax.ops.patches import Grid


def test_eight_cpu_devices():
    assert [device.platform for device in jax.devices()] == ["cpu"] * 8


def test_a_wrong_shape_raises():
    values, index = jnp.zeros((2, 4, 3)), jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(TypeCheckError):  # 2 images, indices of 1
        take(values, index)


def test_a_wrong_dtype_raises():
    with pytest.raises(TypeCheckError):
        cut(jnp.zeros((1, 4), jnp.float32), 2)


def test_a_wrong_shape_raises_in_methods_and_under_jit():
    scalar_key, grid = jax.random.key(0), Grid(2, 2, 16)
    with pytest.raises(TypeCheckError):  # wants a vector of keys
        jax.jit(lambda key: Random().__call__(key, grid))(scalar_key)


def test_dtypes_are_not_promoted():
    with pytest.raises(Exception, match="dtype promotion"):
        jnp.zeros(2, jnp.int32) + jnp.zeros(2, jnp.float32)


def test_ranks_are_not_promoted():
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.zeros((2, 2)) + jnp.zeros(2)


def test_warnings_are_errors():
    with pytest.raises(UserWarning):
        warnings.warn("any", UserWarning, stacklevel=1)
    with pytest.raises(RuntimeWarning):
        np.float32(1) / np.float32(0)


def test_the_files_that_begin_first_are_there(pytestconfig):
    here = pathlib.Path(__file__).parent
    (ours,) = (
        plugin
        for plugin in pytestconfig.pluginmanager.get_plugins()
        if getattr(plugin, "__file__", None) == str(here / "conftest.py")
    )
    named = set(ours.LONGEST)
    assert named and named <= {path.stem for path in here.rglob("*_test.py")}
