# SPDX-License-Identifier: Apache-2.0
"""What a traced function computes."""

import math

import jax.extend


def matmul_flops(jaxpr):
    """FLOPs of the matrix products of a traced function, two per multiply-add."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            inner = math.prod(shape[axis] for axis in contracted)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        for value in equation.params.values():
            inside = getattr(value, "jaxpr", value)
            if isinstance(inside, jax.extend.core.Jaxpr):
                total += matmul_flops(inside)
    return total
