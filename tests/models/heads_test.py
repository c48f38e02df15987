# SPDX-License-Identifier: Apache-2.0
import functools
import math

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.models.heads import BatchNorm, Classifier, Head, Prototypes
from mim_jax.sharding import Mesh, by_row

SMALL = dict(hidden=10, out=6)


def draw(shape=(8, 3, 7), seed=0):
    """Tokens whose channels have means and deviations of their own."""
    random = np.random.RandomState(seed)
    width = shape[-1]
    scale, shift = random.uniform(0.1, 3, width), random.uniform(-2, 2, width)
    return random.standard_normal(shape) * scale + shift


def params_of(head, width=7, shape=None):
    """Parameters of which none is neutral."""
    shape = shape or (2, 3, width)
    like = jax.eval_shape(head.init, jax.random.key(0), jnp.zeros(shape, jnp.float32))
    random = np.random.RandomState(1)

    def leaf(like):
        return jnp.asarray(random.standard_normal(like.shape), like.dtype)

    return jax.tree.map(leaf, like["params"]) if like else {}


@functools.partial(jax.jit, static_argnums=0)
def apply(head, params, x):
    return head.apply({"params": params}, x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batch_norm_is_over_all_leading_axes(dtype):
    norm = BatchNorm(dtype)
    x, params = jnp.asarray(draw(), dtype), params_of(norm)
    out = apply(norm, params, x)
    assert out.dtype == dtype
    expected = by_hand.batch_norm(np.asarray(x, np.float64))
    expected = expected * np.asarray(params["scale"]) + np.asarray(params["bias"])
    # Statistics are float32 at least: bfloat16 rounds the output and no more.
    np.testing.assert_allclose(
        np.asarray(out, np.float64),
        expected,
        rtol={"float32": 1e-5, "bfloat16": 2**-8}[dtype],
        atol=2e-5,
    )


def test_batch_norm_of_a_sharded_batch_is_over_all_devices():
    head = Head(**SMALL, last_norm=True)
    params, x = params_of(head), jnp.asarray(draw(), jnp.float32)

    @jax.jit
    def both(params, x):
        weight = jnp.arange(6, dtype=jnp.float32)[None, None]
        return jax.value_and_grad(
            lambda x: (
                ((out := apply(head, params, x)) ** 3 * weight).sum() + out[0].sum()
            )
        )(x)

    spread = jax.device_put(x, by_row(Mesh().build()))
    assert len(spread.sharding.device_set) == 8
    out = apply(head, params, spread)
    assert len(out.sharding.device_set) == 8  # one image on each
    np.testing.assert_allclose(out, apply(head, params, x), atol=1e-5)
    (loss, grad), (one, expected) = both(params, spread), both(params, x)
    assert math.isclose(loss, one, rel_tol=1e-5)
    largest = jnp.abs(expected).max()
    np.testing.assert_allclose(grad, expected, rtol=0, atol=1e-5 * largest)


STRUCTURES = {
    # C-MAE's: no bias before a batch norm, whose own would cancel it.
    (): {
        "fc1": {"kernel": (7, 10)},
        "norm1": {"scale": (10,), "bias": (10,)},
        "fc2": {"kernel": (10, 6), "bias": (6,)},
    },
    # MoCo v3's projector.
    (("layers", 3), ("activation", "relu"), ("last_norm", True)): {
        "fc1": {"kernel": (7, 10)},
        "norm1": {"scale": (10,), "bias": (10,)},
        "fc2": {"kernel": (10, 10)},
        "norm2": {"scale": (10,), "bias": (10,)},
        "fc3": {"kernel": (10, 6)},  # and a last norm with nothing to learn
    },
    (("norm", "layer"),): {
        "fc1": {"kernel": (7, 10), "bias": (10,)},
        "norm1": {"scale": (10,), "bias": (10,)},
        "fc2": {"kernel": (10, 6), "bias": (6,)},
    },
    (("norm", "none"), ("activation", "relu")): {
        "fc1": {"kernel": (7, 10), "bias": (10,)},
        "fc2": {"kernel": (10, 6), "bias": (6,)},
    },
    (("layers", 1),): {"fc1": {"kernel": (7, 6), "bias": (6,)}},
}


@pytest.mark.parametrize("fields", STRUCTURES)
def test_head_by_hand(fields):
    head = Head(**SMALL, **dict(fields))
    params, x = params_of(head), draw()
    shapes = jax.tree.map(lambda leaf: leaf.shape, params)
    assert shapes == STRUCTURES[fields]
    how = {k: v for k, v in fields if k != "layers"}
    expected = by_hand.head(params, x, **how)
    out = apply(head, params, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(
        out, expected, rtol=0, atol=2e-5 * np.abs(expected).max()
    )
    kernels = [layer["kernel"] for layer in params.values() if "kernel" in layer]
    assert head.flops(7) == sum(2 * kernel.size for kernel in kernels)


def test_initial_parameters():
    head = Head()
    init = jax.jit(head.init)(jax.random.key(0), jnp.zeros((1, 2, 384)))
    params = jax.device_get(init["params"])
    assert params["fc2"]["kernel"].shape == (2048, 768)
    for layer, ends in (("fc1", 384 + 2048), ("fc2", 2048 + 768)):
        largest = np.abs(params[layer]["kernel"]).max()
        assert 0.99 * math.sqrt(6 / ends) < largest <= math.sqrt(6 / ends)
    assert (params["norm1"]["scale"] == 1).all() and (
        params["norm1"]["bias"] == 0
    ).all()
    assert (params["fc2"]["bias"] == 0).all()


@pytest.mark.parametrize("name", ["layers", "hidden", "out"])
def test_sizes_that_do_not_fit_are_refused(name):
    Head(**SMALL).check_sizes("projector")
    with pytest.raises(ValueError, match=f"projector.{name}=0"):
        Head(**SMALL | {name: 0}).check_sizes("projector")


def test_prototypes_are_met_by_direction_alone():
    head = Prototypes(layers=2, hidden=10, bottleneck=5, out=9)
    params, x = params_of(head, shape=(2, 7)), draw((4, 7))
    assert set(params) == {"mlp", "prototypes"}
    rows = by_hand.unit(by_hand.head(params["mlp"], x, norm="none"))
    prototypes = by_hand.unit(np.asarray(params["prototypes"], np.float64).T)
    out = apply(head, params, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(out, rows @ prototypes.T, atol=1e-5)
    sizes = [leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim == 2]
    assert head.flops(7) == 2 * sum(sizes)


def test_classifier():
    head = Classifier(classes=300, deviation=0.01)
    params = jax.jit(head.init)(jax.random.key(0), jnp.zeros((1, 200)))["params"]
    kernel = np.asarray(params["linear"]["kernel"])
    assert kernel.shape == (200, 300)
    # Not cut off at twice its deviation, which would leave .8796 of it: what PyTorch
    # code calls a truncated normal of .01 is cut off at 2.
    assert math.isclose(kernel.std(), 0.01, rel_tol=0.02)
    assert np.abs(kernel).max() > 0.03
    assert (params["linear"]["bias"] == 0).all()
    short = Classifier(classes=300, dtype="bfloat16")
    assert apply(short, params, jnp.ones((1, 200))).dtype == "float32"
