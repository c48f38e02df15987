# SPDX-License-Identifier: Apache-2.0
"""PSNR and SSIM against scikit-image, FSIM against stored values of piq."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import distorted
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from mim_jax.ops import similarity
from mim_jax.ops.similarity import psnr

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def _pair():
    rng = np.random.default_rng(0)
    image = rng.random((3, 8, 10, 3)).astype(np.float32)
    noise = 0.1 * rng.standard_normal(image.shape).astype(np.float32)
    return image, np.clip(image + noise, 0, 1)


def test_psnr_is_scikit_images():
    image, other = _pair()
    wanted = [
        peak_signal_noise_ratio(a, b, data_range=1.0)
        for a, b in zip(image, other, strict=True)
    ]
    np.testing.assert_allclose(
        psnr(jnp.asarray(image), jnp.asarray(other)), wanted, 1e-5
    )


def test_psnr_of_a_region_sees_that_region_alone():
    image, other = _pair()
    region = np.zeros(image.shape[:3], bool)
    region[:, 2:5, 3:9] = True
    got = psnr(jnp.asarray(image), jnp.asarray(other), jnp.asarray(region))
    wanted = psnr(jnp.asarray(image[:, 2:5, 3:9]), jnp.asarray(other[:, 2:5, 3:9]))
    np.testing.assert_allclose(got, wanted, 1e-5)


def test_identity_is_infinite():
    image, _ = _pair()
    assert np.isposinf(psnr(jnp.asarray(image), jnp.asarray(image))).all()


# SSIM and FSIM against other implementations

STORED = json.loads((GOLDEN / "similarity.json").read_text())["fsim_fsimc"]
PAIRS = {name: (image, reference) for name, image, reference in distorted.pairs()}


@functools.cache
def jitted(function, **options):
    return jax.jit(functools.partial(function, **options))


def values(function, *images, **options):
    arrays = [jnp.asarray(image, jnp.float32)[None] for image in images]
    return float(jitted(function, **options)(*arrays)[0])


@pytest.mark.parametrize("name", [name for name in PAIRS if "large" not in name])
def test_ssim_is_that_of_scikit_image(name):
    expected = structural_similarity(
        *PAIRS[name],
        data_range=1.0,
        channel_axis=-1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert 0.3 < expected < 0.99
    assert values(similarity.ssim, *PAIRS[name]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", PAIRS)
def test_fsim_is_that_of_piq(name):
    for chromatic, expected in zip((False, True), STORED[name], strict=True):
        found = values(similarity.fsim, *PAIRS[name], chromatic=chromatic)
        assert 0.6 < expected < 0.999
        assert found == pytest.approx(expected, abs=1e-4)


def test_fsim_of_grey_images_is_that_of_their_luminance():
    image, reference = PAIRS["coffee noise"]
    grey = [x[..., :1] for x in (image, reference)]
    coloured = [np.repeat(x, 3, axis=-1) for x in grey]
    one, three = (values(similarity.fsim, *x) for x in (grey, coloured))
    assert one == pytest.approx(three, abs=1e-5)


@pytest.mark.parametrize("function", [similarity.ssim, similarity.fsim])
def test_identity_symmetry_and_order(function):
    image = distorted.crops()["cat"][:64, :64]
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 1, image.shape)
    scores = []
    for strength in (0.0, 0.02, 0.05, 0.15):
        other = np.clip(image + strength * noise, 0, 1)
        scores.append(values(function, image, other))
        assert values(function, other, image) == pytest.approx(scores[-1], abs=1e-6)
    assert scores[0] == 1 and scores == sorted(scores, reverse=True)
    assert scores[-1] < 0.9


@pytest.mark.parametrize("function", [similarity.ssim, similarity.fsim])
def test_rows_do_not_mix_and_gradients_are_finite(function):
    images = np.stack([distorted.crops()["cat"][i : i + 40, :48] for i in (0, 30)])
    images[1] = 0.25  # flat: square roots of zero
    other = np.clip(images + 0.1, 0, 1)[::-1].copy()
    one, two = jnp.asarray(images, jnp.float32), jnp.asarray(other, jnp.float32)
    together = jitted(function)(one, two)
    alone = [jitted(function)(one[i : i + 1], two[i : i + 1])[0] for i in (0, 1)]
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    slope = jax.jit(jax.grad(lambda x: function(x, two).sum()))(one)
    assert np.isfinite(slope).all() and np.abs(slope).max() > 0


@pytest.mark.parametrize("function", [similarity.ssim, similarity.fsim])
def test_other_devices_compute_the_same(monkeypatch, function):
    images = np.stack([distorted.crops()["cat"][i : i + 40, :48] for i in (0, 30)])
    one = jnp.asarray(images, jnp.float32)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found = jax.jit(lambda one, other: function(one, other))(one, 1 - one)
    monkeypatch.undo()
    np.testing.assert_allclose(found, jitted(function)(one, 1 - one), rtol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_the_lower_median_is_that_of_sorting(count):
    rng = np.random.default_rng(count)
    values = np.round(rng.exponential(1, count), 1) * 10.0 ** rng.integers(-30, 30)
    values[rng.integers(count)] = 0
    values = values.astype(np.float32)
    median = jax.jit(jax.value_and_grad(similarity._lower_median))
    found, slope = median(jnp.asarray(values))
    assert found == np.sort(values)[(count - 1) // 2]
    # One element decides, and it is one of that value.
    assert np.asarray(slope).sum() == 1 and values[np.argmax(slope)] == found


def test_what_cannot_be_measured_is_said():
    small, two = jnp.zeros((1, 10, 20, 3)), jnp.zeros((1, 20, 20, 2))
    with pytest.raises(ValueError, match="10x20: want at least 11x11"):
        similarity.ssim(small, small)
    with pytest.raises(ValueError, match="2 channel"):
        similarity.fsim(two, two)
    with pytest.raises(ValueError, match="FSIMc of 1 channel"):
        similarity.fsim(two[..., :1], two[..., :1], chromatic=True)


@pytest.mark.oracle
@pytest.mark.parametrize("name", PAIRS)
def test_stored_values_are_those_of_piq_as_installed(name):
    piq, torch = pytest.importorskip("piq"), pytest.importorskip("torch")
    tensors = [torch.tensor(np.moveaxis(x, -1, 0)[None]) for x in PAIRS[name]]
    for chromatic, expected in zip((False, True), STORED[name], strict=True):
        found = float(piq.fsim(*tensors, data_range=1.0, chromatic=chromatic))
        assert found == pytest.approx(expected, abs=1e-9)
