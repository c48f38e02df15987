# SPDX-License-Identifier: Apache-2.0
"""Attention against its formula in float64, and where the kernel is used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.ops import attention
from mim_jax.ops.attention import (
    attend,
    attend_with_weights,
    recomputing_attention,
    short_attention,
)
from mim_jax.ops.backend import compile_for
from mim_jax.sharding import Mesh

# (heads, width, tokens): four heads to a tile of 128 lanes, two, one of them over two
# tiles each (80 lanes), and a head of a tile's size.
MESH = Mesh()
SIZES = [(8, 256, 21), (4, 256, 8), (8, 640, 17), (1, 128, 9)]


def drawn(rows, tokens, width, dtype="float32"):
    rng = np.random.default_rng(width + tokens)
    qkv = rng.normal(size=(rows, tokens, 3 * width)).astype(np.float32)
    bias = rng.normal(size=3 * width).astype(np.float32)
    return jnp.asarray(qkv, dtype), jnp.asarray(bias, dtype)


def by_formula(qkv, bias, heads):
    """softmax(q k / sqrt(c)) v and the softmax, in float64, head by head."""
    qkv = np.asarray(qkv, np.float64) + np.asarray(bias, np.float64)
    width = qkv.shape[2] // 3
    size, mixed, weights = width // heads, [], []
    for head in range(heads):
        q, k, v = (
            qkv[:, :, at + head * size : at + (head + 1) * size]
            for at in (0, width, 2 * width)
        )
        raised = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(size))
        weights.append(raised / raised.sum(axis=-1, keepdims=True))
        mixed.append(weights[-1] @ v)
    return np.concatenate(mixed, axis=-1), np.stack(weights, axis=1)


@pytest.mark.parametrize("heads, width, tokens", SIZES)
def test_all_forms_are_the_formula(heads, width, tokens):
    qkv, bias = drawn(2, tokens, width)
    expected, weights = by_formula(qkv, bias, heads)
    with jax.default_matmul_precision("highest"):
        found, seen = attend_with_weights(qkv, bias, heads)
        kernel = short_attention(qkv, bias, heads, True)
        for mixed in (found, kernel, recomputing_attention(qkv, bias, heads)):
            np.testing.assert_allclose(mixed, expected, rtol=0, atol=3e-5)
    np.testing.assert_allclose(attend(qkv, bias, heads), expected, atol=3e-5)
    np.testing.assert_allclose(seen, weights, rtol=0, atol=1e-5)


FORMS = {
    "kernel": lambda *args: short_attention(*args, True),
    "recomputing": recomputing_attention,
    "image by image": recomputing_attention,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("heads, width, tokens", SIZES)
def test_gradients_are_differences(monkeypatch, heads, width, tokens, form):
    """Along random directions, of the formula in float64."""
    if form == "image by image":
        monkeypatch.setattr(attention, "_LOOP", 0)
    qkv, bias = drawn(3, tokens, width)
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(3, tokens, width))

    def loss(qkv, bias):
        mixed = FORMS[form](qkv, bias, heads)
        return (mixed * jnp.asarray(weight, jnp.float32)).sum()

    with jax.default_matmul_precision("highest"):
        gradients = jax.grad(loss, argnums=(0, 1))(qkv, bias)
    for number, gradient in enumerate(gradients):
        for part in range(3):  # q, k and v alone: an error of one does not hide
            step = rng.normal(size=gradient.shape)
            mine = np.arange(3 * width) // width == part
            step = 1e-5 * np.where(mine, step, 0)
            ends = []
            for sign in (1, -1):
                moved = [np.asarray(qkv, np.float64), np.asarray(bias, np.float64)]
                moved[number] = moved[number] + sign * step
                ends.append((weight * by_formula(*moved, heads)[0]).sum())
            expected = (ends[0] - ends[1]) / 2e-5
            found = (np.asarray(gradient, np.float64) * step).sum() / 1e-5
            # Of all parts: that of a bias of keys is zero, which softmax forgets.
            scale = np.linalg.norm(gradient)
            assert abs(found - expected) < 1e-4 * scale


def test_half_precision_keeps_logits_and_sums_in_float32():
    qkv, bias = drawn(2, 33, 128, "bfloat16")
    expected, _ = by_formula(qkv.astype("float32"), bias.astype("float32"), 4)
    found = short_attention(qkv, bias, 4, True)
    assert found.dtype == "bfloat16"
    error = np.abs(np.asarray(found, np.float64) - expected)
    assert error.max() < 0.05 and error.mean() < 0.005


def test_the_kernel_wants_whole_tiles():
    qkv, bias = drawn(1, 4, 96)
    with pytest.raises(ValueError, match="width 96: want a multiple of 128"):
        short_attention(qkv, bias, 3, True)


def kernels(rows=8, tokens=5, width=128, heads=4, dtype="bfloat16", mesh=MESH):
    """How many kernels `attend` traced for a TPU has, forward and back."""
    qkv, bias = drawn(rows, tokens, width, dtype)
    devices = mesh.build() if mesh else None

    def step(qkv, bias):
        return jax.vjp(lambda *args: attend(*args, heads), qkv, bias)[1](
            jnp.ones((rows, tokens, width), dtype)
        )

    with compile_for("tpu", devices):
        return str(jax.make_jaxpr(step)(qkv, bias)).count("pallas_call[")


def test_the_kernel_runs_where_it_can():
    assert kernels() == 2
    assert kernels(width=96, heads=3) == 0  # lanes
    assert kernels(dtype="float32") == 0
    assert kernels(rows=12) == 0  # on 8 devices
    assert kernels(mesh=None) == 0  # nobody told over what rows are split
    assert kernels(width=256, mesh=Mesh(tensor=2)) == 2
    assert kernels(mesh=Mesh(tensor=2)) == 0  # lanes of a device's own heads
    assert kernels(width=384, heads=3, mesh=Mesh(tensor=2)) == 0  # half a head
    assert kernels(tokens=700) == 0  # its weights have no room, as far as is known
    qkv, bias = drawn(8, 5, 128, "bfloat16")
    with compile_for("cpu", Mesh().build()):
        text = str(jax.make_jaxpr(lambda *args: attend(*args, 4))(qkv, bias))
    assert "pallas_call" not in text


def test_a_head_is_worked_on_in_the_tiles_that_it_lies_in():
    """Its first lane and its lanes: more would be matrix work for nothing."""
    found = [
        attention._window(head, size) for head, size in [(5, 32), (1, 80), (2, 80)]
    ]
    assert found == [(128, 128), (0, 256), (128, 128)]
