# SPDX-License-Identifier: Apache-2.0
"""The usage examples in docstrings of evaluations work as they stand."""

import doctest
import importlib
import pkgutil

import jax
import pytest

from mim_jax import evals

MODULES = [
    f"{evals.__name__}.{one.name}" for one in pkgutil.iter_modules(evals.__path__)
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of(name):
    # As a reader's own program: without the strictness of these tests.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = doctest.testmod(importlib.import_module(name))
    assert found.failed == 0
