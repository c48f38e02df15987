# SPDX-License-Identifier: Apache-2.0
"""Colours against scikit-image and Pillow, randomness against what it promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance
from skimage import color

from mim_jax.ops import augment
from mim_jax.ops.augment import ColorJitter


@pytest.fixture(scope="module")
def photo():
    image = np.random.default_rng(0).random((9, 11, 3)).astype(np.float32)
    image[0, 0], image[0, 1], image[1, 1], image[2, 2] = 0.5, 0, [1, 0, 0], 1
    return image


@pytest.mark.parametrize("turns", [-0.4, 0.0, 0.1, 0.5, 0.75])
def test_hue_turns_as_in_hsv(photo, turns):
    hsv = color.rgb2hsv(photo.astype(np.float64))
    hsv[..., 0] = (hsv[..., 0] + turns) % 1
    turned = augment.adjust_hue(jnp.asarray(photo), turns)
    np.testing.assert_allclose(turned, color.hsv2rgb(hsv), atol=2e-6)


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
@pytest.mark.parametrize(
    "ours, theirs",
    [
        (augment.adjust_brightness, ImageEnhance.Brightness),
        (augment.adjust_contrast, ImageEnhance.Contrast),
        (augment.adjust_saturation, ImageEnhance.Color),
    ],
)
def test_changes_are_those_of_pillow(photo, ours, theirs, factor):
    pixels = np.round(photo * 255).astype(np.uint8)
    wanted = np.asarray(theirs(Image.fromarray(pixels)).enhance(factor))
    got = ours(jnp.asarray(pixels / 255, jnp.float32), factor) * 255
    # Pillow rounds grey values and results to whole numbers.
    np.testing.assert_allclose(got, wanted, atol=1.6)


def test_luma_is_pillows(photo):
    pixels = np.round(photo * 255).astype(np.uint8)
    wanted = np.asarray(Image.fromarray(pixels).convert("L"))
    got = augment.luma(jnp.asarray(pixels / 255, jnp.float32))[..., 0] * 255
    np.testing.assert_allclose(got, wanted, atol=1)


def test_jitter_is_a_function_of_each_images_own_key(photo):
    images = jnp.asarray(np.stack([photo] * 6))
    keys = jax.random.split(jax.random.key(1), 6)
    jitter = jax.jit(ColorJitter(p=1.0, gray_p=0.0))
    whole, reverse = jitter(images, keys), jitter(images, keys[::-1])
    np.testing.assert_array_equal(whole, reverse[::-1])
    assert len({np.asarray(image).tobytes() for image in whole}) == 6
    assert whole.min() >= 0 and whole.max() <= 1


def test_jitter_hits_the_shares_it_promises(photo):
    images = jnp.broadcast_to(jnp.asarray(photo), (2000, *photo.shape))
    keys = jax.random.split(jax.random.key(2), 2000)
    out = jax.jit(ColorJitter(p=0.8, gray_p=0.2))(images, keys)
    unchanged = np.mean(np.all(np.asarray(out == images), axis=(1, 2, 3)))
    grey = np.mean(np.all(np.ptp(np.asarray(out), axis=-1) == 0, axis=(1, 2)))
    # Binomial: five standard deviations are about .045 and .041.
    assert abs(unchanged - 0.2 * 0.8) < 0.045
    assert abs(grey - 0.2) < 0.045


@pytest.mark.parametrize("which", ["brightness", "contrast", "saturation", "hue"])
def test_each_strength_reaches_its_bounds_and_no_further(photo, which):
    off = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0)
    jitter = ColorJitter(**(off | {which: 0.3}), p=1.0, gray_p=0.0)
    pixel = np.full((1, 2, 3), [0.6, 0.4, 0.2], np.float32)
    pixel[0, 1] = [0.3, 0.5, 0.4]
    images = jnp.broadcast_to(jnp.asarray(pixel), (1000, *pixel.shape))
    keys = jax.random.split(jax.random.key(3), 1000)
    out = np.asarray(jax.jit(jitter)(images, keys), np.float64)
    change = {
        "brightness": lambda x: x[0, 0, 0] / 0.6 - 1,
        # Distances between pixels (contrast), or between channels (saturation).
        "contrast": lambda x: (x[0, 0, 0] - x[0, 1, 0]) / 0.3 - 1,
        "saturation": lambda x: (x[0, 0, 0] - x[0, 0, 2]) / 0.4 - 1,
        "hue": lambda x: (color.rgb2hsv(x)[0, 0, 0] - 1 / 12 + 0.5) % 1 - 0.5,
    }[which]
    found = np.array([change(image) for image in out])
    assert -0.3001 < found.min() < -0.29 and 0.29 < found.max() < 0.3001
    assert abs(found.mean()) < 0.03  # five standard deviations of a uniform mean


def test_normalise_and_back():
    images = np.arange(2 * 2 * 3 * 2, dtype=np.uint8).reshape(2, 2, 3, 2)
    mean, std = (0.1, 0.4), (0.5, 0.25)
    standard = augment.normalise(augment.to_float(jnp.asarray(images)), mean, std)
    np.testing.assert_allclose(standard[..., 1], (images[..., 1] / 255 - 0.4) * 4, 1e-5)
    back = augment.denormalise(standard, mean, std)
    np.testing.assert_allclose(back, images / 255, atol=1e-6)


@pytest.mark.parametrize("name, value", [("hue", 0.6), ("p", 1.1), ("contrast", -0.1)])
def test_a_strength_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}: want 0 <= {name}"):
        ColorJitter(**{name: value})
