# SPDX-License-Identifier: Apache-2.0
"""Gradients in bfloat16: sums over many tokens are made in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY, plan_of

from mim_jax import train
from mim_jax.kernels import FORMS
from mim_jax.models.decoder import Decoder
from mim_jax.models.vit import Encoder
from mim_jax.objectives.mae import MAE
from mim_jax.ops.attention import attention
from mim_jax.sharding import path_name

SUMS = ("reduce_sum", "cumsum", "scatter-add", "reduce_window_sum")
FEW = 64  # numbers that may be added in bfloat16


def short_sums(jaxpr) -> set[str]:
    """Sums of many numbers whose result is bfloat16, in a program and those inside."""
    found = set()
    for one in jaxpr.eqns:
        kinds = [str(out.aval.dtype) for out in one.outvars if hasattr(out, "aval")]
        if one.primitive.name in SUMS and "bfloat16" in kinds:
            count = one.invars[0].aval.size // max(one.outvars[0].aval.size, 1)
            if count > FEW:
                place = one.source_info.name_stack
                found.add(f"{one.primitive.name} of {count}: {place}")
        for value in one.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                if inner := getattr(inner, "jaxpr", inner):
                    if hasattr(inner, "eqns"):
                        found |= short_sums(inner)
    return found


@pytest.mark.parametrize("name", TINY)
def test_no_gradient_is_summed_in_bfloat16(name):
    plan = plan_of(name, 1, dtype="bfloat16")
    state, batch = plan.abstract_state(), plan.abstract_batch()
    program = jax.make_jaxpr(train.step_of(plan))(state, batch)
    assert short_sums(program.jaxpr) == set()


def gradients(dtype, images, **more):
    objective = MAE(
        encoder=Encoder(patch=4, width=32, depth=2, heads=2, dtype=dtype, **more),
        decoder=Decoder(width=32, depth=1, heads=2, dtype=dtype),
    )
    params, _ = objective.init(jax.random.key(0), {"image": images[:1]})
    keys = jax.random.split(jax.random.key(1), len(images))

    def loss(params):
        return objective.loss(params, None, {"image": images}, keys)[0]

    found = jax.jit(jax.grad(loss))(params)
    return {
        path_name(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(found)
    }


@pytest.mark.parametrize(
    "more", [{}, dict(positions="learned", layer_scale=0.1, drop_path=0.2)]
)
def test_biases_tokens_positions_and_gains_have_the_gradients_of_float32(more):
    rng = np.random.default_rng(0)
    coarse = rng.normal(0, 1, (96, 6, 6, 3))
    smooth = jax.image.resize(coarse, (96, 32, 32, 3), "cubic")
    noise = 8 * rng.normal(size=smooth.shape)
    images = jnp.clip(128 + 50 * smooth + noise, 0, 255).astype(jnp.uint8)
    want, got = (gradients(dtype, images, **more) for dtype in ("float32", "bfloat16"))
    for path, leaf in want.items():
        if "key" in path or not np.linalg.norm(leaf):
            continue
        error = np.linalg.norm(got[path] - leaf) / np.linalg.norm(leaf)
        assert error < 0.04, f"{path}: {error}"


@pytest.mark.parametrize("run", [attention, FORMS["keep"].run, FORMS["recompute"].run])
def test_the_bias_of_attention_has_its_gradient_in_float32(run):
    rng = np.random.default_rng(0)
    qkv, weights = rng.normal(size=(64, 65, 96)), rng.normal(size=(64, 65, 32))
    bias = jnp.asarray(rng.normal(size=96), jnp.float32)

    def gradient(dtype):
        def total(bias):
            mixed = run(jnp.asarray(qkv, dtype), bias, 2)
            mixed = mixed[0] if isinstance(mixed, tuple) else mixed
            assert mixed.dtype == dtype
            return (mixed.astype(jnp.float32) * weights).sum()

        return np.asarray(jax.jit(jax.grad(total))(bias))

    want, got = gradient("float32"), gradient("bfloat16")
    for part in range(3):
        own = slice(32 * part, 32 * (part + 1))
        if part == 1:  # the softmax does not see a bias of the keys
            continue
        error = np.linalg.norm(got[own] - want[own]) / np.linalg.norm(want[own])
        assert error < 0.03, error
