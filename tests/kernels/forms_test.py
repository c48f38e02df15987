# SPDX-License-Identifier: Apache-2.0
"""Every form of attention against its formula in float64, and which form is chosen."""

import doctest
import types
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.kernels import FORMS, attend, base, choice, cpu, gpu, long, tpu
from mim_jax.kernels.base import Kernels, Site
from mim_jax.kernels.choice import choose_attention, described, with_kernels
from mim_jax.kernels.spread import gathered
from mim_jax.models.decoder import Decoder
from mim_jax.models.vit import Dense, Encoder
from mim_jax.objectives.mae import MAE
from mim_jax.ops.attention import attention
from mim_jax.sharding import Mesh

# (heads, width, tokens): four heads to a tile of 128 lanes, two, one of them over two
# tiles each (80 lanes), a head of a tile's size, and more tokens than `long.block_of`
# takes at once.
SIZES = [(8, 256, 21), (4, 256, 8), (8, 640, 17), (1, 128, 9), (2, 128, 270)]


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


by_jax = jax.nn.dot_product_attention


def without_cudnn(qkv, bias, heads):
    """cuDNN's form with JAX's own attention in the place of cuDNN's."""

    def stand_in(*arrays, implementation, **lengths):
        assert implementation == "cudnn"
        assert arrays[0].shape[1] % 2 == 0  # JAX refuses others
        return by_jax(*arrays, **lengths)

    with mock.patch("jax.nn.dot_product_attention", stand_in):
        return gpu.cudnn_attention(qkv, bias, heads)


# What runs on this machine, by the name of its row.
HERE = {
    "plain": lambda *args: attention(*args)[0],
    "keep": cpu.keeping_attention,
    "recompute": cpu.recomputing_attention,
    "pallas": lambda *args: tpu.short_attention(*args, True),
    "splash": lambda *args: long.long_attention(*args, True),
    "cudnn": without_cudnn,
}


def test_every_form_is_tested_here():
    missing = set(FORMS) - set(HERE)
    assert not missing, f"add {missing} to HERE in this file"


@pytest.mark.parametrize("module", [base, choice])
def test_the_examples_run(module):
    with mock.patch.dict(FORMS):
        found = doctest.testmod(module)
    assert found.attempted and not found.failed


@pytest.mark.parametrize("form", HERE)
@pytest.mark.parametrize("heads, width, tokens", SIZES)
def test_a_form_is_the_formula(heads, width, tokens, form):
    qkv, bias = drawn(2, tokens, width)
    expected, weights = by_formula(qkv, bias, heads)
    with jax.default_matmul_precision("highest"):
        mixed = HERE[form](qkv, bias, heads)
        _, seen = attention(qkv, bias, heads)
    np.testing.assert_allclose(mixed, expected, rtol=0, atol=3e-5)
    np.testing.assert_allclose(seen, weights, rtol=0, atol=1e-5)


LOOPS = ("keep", "recompute")  # which may go image by image


@pytest.mark.parametrize(
    "form, loop", [(one, False) for one in HERE] + [(one, True) for one in LOOPS]
)
@pytest.mark.parametrize("heads, width, tokens", SIZES)
def test_gradients_are_differences(monkeypatch, heads, width, tokens, form, loop):
    """Along random directions, of the formula in float64."""
    if loop:
        monkeypatch.setattr(cpu, "LOOP_BYTES", 0)
    qkv, bias = drawn(3, tokens, width)
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(3, tokens, width))

    def loss(qkv, bias):
        mixed = HERE[form](qkv, bias, heads)
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


# Products of transposed weights in XLA's text: of all images, or of one.
TRANSPOSED = (
    "lhs_batch_dims={0,1}, lhs_contracting_dims={2}",
    "lhs_batch_dims={0}, lhs_contracting_dims={1}",
)


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize(
    "form, there", [("keep", False), ("recompute", False), ("plain", True)]
)
def test_weights_of_narrow_heads_are_not_transposed(monkeypatch, form, there, loop):
    """Which is why these forms are fast on CPUs: XLA must not fold the transposes of
    the other factor back."""
    monkeypatch.setattr(cpu, "LOOP_BYTES", 0 if loop else 2**30)

    def loss(qkv, bias):
        return (HERE[form](qkv, bias, 4) ** 2).sum()

    compiled = jax.jit(jax.grad(loss)).lower(*drawn(8, 65, 64)).compile()
    text = compiled.as_text() or ""
    assert any(one in text for one in TRANSPOSED) == there


@pytest.mark.parametrize("form", ["pallas", "splash"])
def test_half_precision_keeps_logits_and_sums_in_float32(form):
    qkv, bias = drawn(2, 33, 128, "bfloat16")
    expected, _ = by_formula(qkv.astype("float32"), bias.astype("float32"), 4)
    found = HERE[form](qkv, bias, 4)
    assert found.dtype == "bfloat16"
    error = np.abs(np.asarray(found, np.float64) - expected)
    assert error.max() < 0.05 and error.mean() < 0.005


@pytest.mark.parametrize("form", ["keep", "recompute"])
def test_half_precision_on_a_cpu_errs_no_more_than_the_plain_form(form):
    qkv, bias = drawn(4, 65, 64, "bfloat16")
    expected, _ = by_formula(qkv.astype("float32"), bias.astype("float32"), 4)

    def error(name):
        found = HERE[name](qkv, bias, 4)
        assert found.dtype == "bfloat16"
        return np.abs(np.asarray(found, np.float64) - expected).mean()

    assert error(form) < 1.1 * error("plain")


@pytest.mark.parametrize("absent", ["jax.nn.nowhere", "jax.nowhere.splash"])
def test_a_jax_without_splash_attention_has_the_other_forms(monkeypatch, absent):
    monkeypatch.setattr(long, "_SPLASH", absent)
    assert choose_attention("auto", V5E._replace(tokens=4097)) == "plain"
    with pytest.raises(ValueError, match=f"has no {absent}: want jax 0.10.2"):
        choose_attention("splash", V5E._replace(tokens=4097))


@pytest.mark.parametrize(
    "tokens, block",
    [(9, 128), (270, 384), (577, 640), (1024, 1024), (1370, 768), (4097, 384)],
)
def test_blocks_are_large_and_add_few_tokens(tokens, block):
    assert long.block_of(tokens) == block


def test_the_kernel_wants_whole_tiles():
    qkv, bias = drawn(1, 4, 96)
    with pytest.raises(ValueError, match="width 96: want a multiple of 128"):
        tpu.short_attention(qkv, bias, 3, True)


V5E = Site("tpu", "TPU v5 lite", "bfloat16", tokens=197, width=768, heads=12)
H100 = V5E._replace(platform="gpu", device="NVIDIA H100", capability="9.0")
CPU = Site("cpu", "cpu", "float32", tokens=197, width=768, heads=12)


@pytest.mark.parametrize(
    "site, form",
    [
        (V5E, "pallas"),
        (V5E._replace(width=96, heads=3), "plain"),  # lanes
        (V5E._replace(width=192, heads=3, tokens=65), "plain"),  # and short
        (V5E._replace(width=192, heads=3, tokens=577), "splash"),
        (V5E._replace(tokens=4097), "splash"),  # no room for all weights
        (V5E._replace(tokens=4097, width=1280, heads=16), "splash"),  # heads of 80
        (V5E._replace(tokens=4097, width=1536, heads=6), "plain"),  # of 256
        (V5E._replace(dtype="float32"), "plain"),
        (V5E._replace(device="TPU v4", tokens=785), "splash"),
        (V5E._replace(tokens=785), "pallas"),
        (H100, "cudnn"),
        (H100._replace(dtype="float16"), "cudnn"),
        (H100._replace(dtype="float32"), "plain"),
        (H100._replace(width=1536), "cudnn"),  # heads of 128
        (H100._replace(width=1632), "plain"),  # of 136
        (H100._replace(width=720, heads=60), "plain"),  # of 12
        (H100._replace(tokens=99), "plain"),  # short
        (H100._replace(tokens=100), "cudnn"),
        (H100._replace(capability="8.0"), "cudnn"),
        (H100._replace(capability="12.0"), "cudnn"),
        (H100._replace(capability="7.5"), "plain"),  # older than cuDNN's kernel
        (H100._replace(capability="gfx942"), "plain"),  # AMD's
        (CPU, "recompute"),
        (CPU._replace(tokens=17, width=64, heads=4), "keep"),
        (CPU._replace(width=384), "keep"),  # heads of 32
        (CPU._replace(width=396), "recompute"),  # of 33
        (CPU._replace(width=512, heads=16), "recompute"),  # too many weights
        (CPU._replace(tokens=50), "keep"),  # few weights
        (CPU._replace(platform="other"), "plain"),
    ],
)
def test_auto_takes_the_form_that_fits(site, form):
    assert choose_attention("auto", site) == form
    assert choose_attention("plain", site) == "plain"


@pytest.mark.parametrize(
    "wanted, site, reason",
    [
        (
            "palas",
            V5E,
            "'palas' is unknown; known: auto, plain, cudnn, keep, pallas, rec",
        ),
        (
            "pallas",
            CPU,
            "it runs on tpu: want plain or recompute or keep, or attention='auto'",
        ),
        ("pallas", V5E._replace(dtype="float32"), "float32: want bfloat16"),
        ("pallas", V5E._replace(width=700), "width 700 .* multiple of 128"),
        ("pallas", V5E._replace(tokens=4097), "4097 tokens need .* want at most 120"),
        ("splash", V5E._replace(dtype="float32"), "float32: want bfloat16"),
        ("splash", V5E._replace(width=1584), "heads of 132: .* of 8 from 32 to 128"),
        ("splash", V5E._replace(width=288), "heads of 24: want a multiple of 8"),
        ("cudnn", H100._replace(width=1632), "heads of 136 numbers: want a multiple"),
        ("cudnn", H100._replace(capability="7.5"), "capability '7.5': want CUDA's 8.0"),
    ],
)
def test_a_form_that_cannot_run_is_refused_with_its_reason(wanted, site, reason):
    with pytest.raises(ValueError, match=reason):
        choose_attention(wanted, site)


def device(platform, kind, **more):
    return types.SimpleNamespace(platform=platform, device_kind=kind, **more)


def test_an_objective_is_told_its_forms_and_they_are_part_of_its_value():
    objective = MAE(
        encoder=Encoder(width=256, heads=4, dtype="bfloat16"),
        decoder=Decoder(width=96, heads=3, dtype="bfloat16"),
    )
    told = with_kernels(objective, "auto", 197, device("tpu", "TPU v5 lite"))
    assert described(told) == "attention: encoder pallas, decoder plain"
    assert told != objective and hash(told) != hash(objective)
    assert told == with_kernels(told, "auto", 197, device("tpu", "TPU v5 lite"))
    assert not told.encoder.kernels.merge_rows
    here = with_kernels(objective, "auto", 197, jax.devices()[0])
    assert here.encoder.kernels == Kernels("recompute", merge_rows=True)
    # Devices that share heads: each has half of them, of 64 numbers.
    mesh = Mesh(tensor=2).build()
    told = with_kernels(objective, "auto", 197, device("tpu", "TPU v5 lite"), mesh)
    assert described(told) == "attention: encoder pallas, decoder plain"
    h100 = device("gpu", "NVIDIA H100", compute_capability="9.0")
    told = with_kernels(objective, "auto", 197, h100, mesh)
    assert described(told) == "attention: encoder cudnn, decoder plain"  # 3 heads
    with pytest.raises(ValueError, match="decoder: attention='cudnn': 3 heads on mesh"):
        with_kernels(objective, "cudnn", 197, h100, mesh)


def test_relative_positions_have_the_plain_form_only():
    mae = MAE(encoder=Encoder(relative_positions=True))
    told = with_kernels(mae, "auto", 4097, device("cpu", "cpu"))
    assert (told.encoder.kernels.attention, told.decoder.kernels.attention) == (
        "plain",
        "recompute",
    )
    with pytest.raises(ValueError, match="encoder: attention='recompute': it cannot"):
        with_kernels(mae, "recompute", 4097, device("cpu", "cpu"))


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(tensor=2), Mesh(fsdp=2, tensor=4)])
@pytest.mark.parametrize("form", ["keep", "recompute"])
def test_a_form_on_several_devices_is_the_form_on_one(mesh, form):
    qkv, bias = drawn(8, 9, 128)
    kernels = Kernels(form, mesh=mesh.build())

    def run(kernels):
        def loss(qkv, bias):
            return (attend(qkv, bias, 4, kernels) ** 2).sum()

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(qkv, bias)

    (one, grads), (many, spread) = run(Kernels(form)), run(kernels)
    np.testing.assert_allclose(many, one, rtol=1e-5)
    for a, b in zip(grads, spread, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-4)


def test_merged_rows_change_nothing():
    x = jax.random.normal(jax.random.key(0), (4, 7, 6))
    params = nn.Dense(5).init(jax.random.key(1), x)

    def run(layer):
        def loss(params, x):
            return (layer.apply(params, x) ** 2).mean()

        program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        return program(params, x), str(program.trace(params, x).jaxpr)

    found, text = run(Dense(5, "float32", Kernels(merge_rows=True)))
    other, other_text = run(Dense(5, "float32"))
    with jax.numpy_rank_promotion("allow"):
        expected, _ = run(nn.Dense(5))  # Flax's own
    for run_ in (found, other):
        for a, b in zip(jax.tree.leaves(run_), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert "f32[28,6]" in text and "f32[28,6]" not in other_text


def test_a_shared_kernel_is_whole_where_it_is_used_and_its_gradient_is_shared():
    mesh = Mesh(fsdp=4).build()
    kernel = jnp.arange(64.0).reshape(8, 8)

    def loss(kernel):
        return (gathered(kernel, mesh, 1) ** 2).sum()

    program = jax.jit(jax.grad(loss))
    np.testing.assert_allclose(program(kernel), 2 * kernel)
    rules = str(program.trace(kernel).jaxpr)
    assert "('tensor', 'fsdp')" in rules


def test_a_head_is_worked_on_in_the_tiles_that_it_lies_in():
    """Its first lane and its lanes: more would be matrix work for nothing."""
    found = [tpu._window(head, size) for head, size in [(5, 32), (1, 80), (2, 80)]]
    assert found == [(128, 128), (0, 256), (128, 128)]
