# SPDX-License-Identifier: Apache-2.0
"""MAE equals transformers' ViTMAEForPreTraining, from stored arrays and live."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_layout import CASES, draw, shapes, to_params, to_weights

from mim_jax.models.decoder import Decoder
from mim_jax.models.vit import Encoder
from mim_jax.objectives.mae import MAE
from mim_jax.ops.masking import from_scores, unshuffle
from mim_jax.ops.patches import grid_of, patchify
from mim_jax.state import stack_blocks, unstack_blocks

_GOLDEN = pathlib.Path(__file__).parent / "golden"
# Relative to the largest entry of the stored array, both times.
_ACCURACY = {"float64": 1e-10, "float32": 1e-5}


def objective(case, dtype, remat="none"):
    (width, depth, heads), (narrow, shallow, few) = case.encoder, case.decoder
    more = dict(mlp_ratio=case.mlp_ratio, dtype=dtype, remat=remat)
    return MAE(
        encoder=Encoder(
            patch=case.patch, width=width, depth=depth, heads=heads, **more
        ),
        decoder=Decoder(width=narrow, depth=shallow, heads=few, **more),
        normalise_target=case.normalise_target,
        mean=(0.0,) * case.channels,
        std=(1.0,) * case.channels,
    )


def ours(case, inputs, dtype, *, remat="none", scan=False, gradients=True):
    """What `make_vitmae.run` gives, by our code in the given precision."""
    weights, pixels, noise = inputs
    with jax.enable_x64(dtype == "float64"):
        mae, grid = (
            objective(case, dtype, remat),
            grid_of(*pixels.shape[2:], case.patch),
        )
        params = to_params({k: v.astype(dtype) for k, v in weights.items()})
        params = stack_blocks(params) if scan else jax.tree.map(jnp.asarray, params)
        images = jnp.asarray(pixels.astype(dtype).transpose(0, 2, 3, 1))
        mask = from_scores(jnp.asarray(noise), case.visible)
        batch = {"image": images, "mask": mask}
        keys = jax.random.split(jax.random.key(0), len(images))

        def outputs(params):
            patches = patchify(images, case.patch)
            tokens, _ = mae.encoder.apply(
                {"params": params["encoder"]}, patches, grid, mask.keep
            )
            predictions = mae.decoder.apply(
                {"params": params["decoder"]},
                *(tokens, mask, grid, patches.shape[-1]),
                predict="all",
            )
            loss = mae.loss(params, None, batch, keys)[0]
            return loss, (tokens, unshuffle(predictions, mask), mask.hidden)

        if gradients:  # in one program: compiling is what takes the time
            outputs = jax.value_and_grad(outputs, has_aux=True)
        result = jax.jit(outputs)(params)
        (loss, rest), grads = result if gradients else (result, None)
        assert all(x.dtype == dtype for x in (loss, *rest[:2]))
        names = ("loss", "tokens", "predictions", "hidden")
        arrays = dict(zip(names, map(np.asarray, (loss, *rest)), strict=True))
        if gradients:
            grads = unstack_blocks(grads) if scan else grads
            arrays["gradients"] = to_weights(grads, case)
        return arrays


def difference(actual, expected):
    """Largest difference, relative to the largest entry of what is expected."""
    assert actual.shape == expected.shape
    return np.abs(actual - expected).max() / np.abs(expected).max()


def stored(name):
    arrays = dict(np.load(_GOLDEN / f"vitmae_{name}.npz"))
    if not CASES[name].stored:
        return arrays, draw(CASES[name])
    weights = {x: arrays[f"weights/{x}"] for x in shapes(CASES[name])}
    return arrays, (weights, arrays["pixels"], arrays["noise"])


# Each pair of layout and recomputation is here once, in one of the precisions.
@pytest.mark.parametrize(
    "name, dtype, scan, remat",
    [
        ("wide", "float64", False, "none"),
        ("wide", "float64", True, "full"),
        ("wide", "float32", True, "dots"),
        ("gray", "float64", True, "none"),
        ("gray", "float64", False, "dots"),
        ("gray", "float32", False, "full"),
    ],
)
def test_stored_arrays(name, dtype, scan, remat):
    case, (expected, inputs) = CASES[name], stored(name)
    actual = ours(case, inputs, dtype, remat=remat, scan=scan)
    np.testing.assert_array_equal(actual["hidden"], expected["hidden"])
    for array in ("tokens", "predictions", "loss"):
        assert difference(actual[array], expected[array]) < _ACCURACY[dtype], array
    # Gradients have lost more digits than what they are gradients of.
    gradients = [actual["gradients"][x] for x in inputs[0]]
    norms = np.array([np.linalg.norm(x) for x in gradients])
    dots = [(g * x).sum() for g, x in zip(gradients, inputs[0].values(), strict=True)]
    accuracy = 10 * _ACCURACY[dtype]
    assert difference(norms, expected["gradient_norms"]) < accuracy
    assert difference(np.array(dots), expected["gradient_dots"]) < accuracy


@pytest.fixture(scope="module")
def base():
    return stored("base")


@pytest.mark.parametrize(
    "dtype", [pytest.param("float64", marks=pytest.mark.slow), "float32"]
)
def test_stored_samples_at_the_size_of_vit_b(dtype, base):
    case, (expected, inputs) = CASES["base"], base
    actual = ours(case, inputs, dtype, scan=True, gradients=False)
    np.testing.assert_array_equal(actual["hidden"], expected["hidden"])
    for array in ("tokens", "predictions"):
        values = actual[array].ravel()
        chosen = np.linspace(0, values.size - 1, expected[array].size).astype(np.int64)
        error = difference(values[chosen], expected[array])
        assert error < _ACCURACY[dtype], array
    assert difference(actual["loss"], expected["loss"]) < _ACCURACY[dtype]


@pytest.mark.parametrize("name", CASES)
def test_names_translate_both_ways(name):
    case = CASES[name]
    weights = {x: np.zeros(shape, np.int8) for x, shape in shapes(case).items()}
    for i, leaf in enumerate(weights.values()):
        leaf.flat[:: i + 1] = i % 100
    params = to_params(weights)
    back = to_weights(params, case)
    assert set(back) == set(weights)
    for x, leaf in weights.items():
        np.testing.assert_array_equal(back[x], leaf, err_msg=x)
    # The tree is exactly the one that a run would start from.
    images = jax.ShapeDtypeStruct(
        (1, case.height, case.width, case.channels), jnp.uint8
    )
    made = jax.eval_shape(
        lambda key, image: objective(case, "float32").init(key, {"image": image})[0],
        *(jax.random.key(0), images),
    )
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, made)


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_live(name, dtype):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from golden import make_vitmae

    torch.set_num_threads(1)
    case, inputs = CASES[name], draw(CASES[name])
    expected = make_vitmae.run(make_vitmae.build(case, inputs[0]), *inputs[1:])
    actual = ours(case, inputs, dtype, scan=name == "base")
    np.testing.assert_array_equal(actual["hidden"], expected["hidden"])
    for array in ("tokens", "predictions", "loss"):
        error = difference(actual[array], expected[array])
        print(name, dtype, array, f"relative {error:.1e}", end=", ")
        print(f"absolute {np.abs(actual[array] - expected[array]).max():.1e}")
        assert error < _ACCURACY[dtype], array
    # Relative to the largest entry of any weight's gradient: some are zero in truth.
    largest = max(np.abs(x).max() for x in expected["gradients"].values())
    worst = max(
        np.abs(actual["gradients"][x] - expected["gradients"][x]).max()
        for x in inputs[0]
    )
    print(name, dtype, f"gradients relative {worst / largest:.1e}")
    assert worst < 10 * _ACCURACY[dtype] * largest
