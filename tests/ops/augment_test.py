# SPDX-License-Identifier: Apache-2.0
"""Colours against scikit-image, Pillow and scipy, randomness against its promises."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image, ImageEnhance, ImageOps
from skimage import color

from mim_jax.ops import augment
from mim_jax.ops.augment import ColorJitter
from mim_jax.ops.mix import Erasing, Mix, cutmix
from mim_jax.ops.patches import denormalise, normalise, to_float


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
    standard = normalise(to_float(jnp.asarray(images)), mean, std)
    np.testing.assert_allclose(standard[..., 1], (images[..., 1] / 255 - 0.4) * 4, 1e-5)
    back = denormalise(standard, mean, std)
    np.testing.assert_allclose(back, images / 255, atol=1e-6)


@pytest.mark.parametrize("name, value", [("hue", 0.6), ("p", 1.1), ("contrast", -0.1)])
def test_a_strength_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}: want 0 <= {name}"):
        ColorJitter(**{name: value})


STILL = dict.fromkeys(("brightness", "contrast", "saturation", "hue", "gray_p"), 0.0)


def copies(image, count, seed=0):
    """The same image many times, and a key for each."""
    images = jnp.broadcast_to(jnp.asarray(image, jnp.float32), (count, *image.shape))
    return images, jax.random.split(jax.random.key(seed), count)


def scipy_blur(image, sigma, radius):
    blurred = [
        scipy.ndimage.gaussian_filter(
            image[..., c].astype(np.float64), sigma, mode="nearest", radius=radius
        )
        for c in range(image.shape[-1])
    ]
    return np.stack(blurred, axis=-1)


@pytest.mark.parametrize("sigma, radius", [(0.3, 2), (1.7, 3), (2.0, 12)])
def test_blur_is_scipys(photo, sigma, radius):
    blur = jax.jit(augment.gaussian_blur, static_argnames="radius")
    sigma = jnp.asarray(sigma, jnp.float32)
    out = blur(jnp.asarray(photo), sigma, radius=radius)
    np.testing.assert_allclose(out, scipy_blur(photo, float(sigma), radius), atol=2e-6)
    flat = jnp.full_like(photo, 0.37)
    np.testing.assert_allclose(blur(flat, sigma, radius=radius), flat, rtol=1e-6)


def test_blur_draws_its_width_between_the_bounds():
    point = np.zeros((13, 13, 1))
    point[6, 6] = 1
    images, keys = copies(point, 1000)
    jitter = ColorJitter(**STILL, blur_p=0.5, blur_sigma=(0.5, 2.0))
    out = np.asarray(jax.jit(jitter)(images, keys))[..., 0]
    np.testing.assert_allclose(out.sum(axis=(1, 2)), 1, rtol=1e-5)
    untouched = (out == point[..., 0]).all(axis=(1, 2))
    assert abs(untouched.mean() - 0.5) < 0.08  # five standard deviations
    peaks = out[~untouched, 6, 6]
    # Cut off at three times the greatest deviation.
    ends = [scipy_blur(point, sigma, radius=6)[6, 6, 0] for sigma in (0.5, 2.0)]
    assert ends[1] <= peaks.min() * 1.0001 < ends[1] * 1.05
    assert ends[0] * 0.95 < peaks.max() <= ends[0] * 1.0001


def test_solarise_is_pillows_after_the_blur(photo):
    pixels = np.round(photo * 255).astype(np.uint8)
    pixels[0, :2] = [[127], [128]]
    images, keys = copies(pixels / 255, 1)
    jitter = ColorJitter(**STILL, solarize_p=1.0)
    out = jax.jit(jitter)(images, keys)[0] * 255
    wanted = np.asarray(ImageOps.solarize(Image.fromarray(pixels), 128))
    np.testing.assert_allclose(out, wanted, atol=1e-3)
    both = ColorJitter(**STILL, blur_p=1.0, blur_sigma=(1.0, 1.0), solarize_p=1.0)
    smooth = scipy_blur(pixels / 255, 1.0, radius=3)
    wanted = np.where(smooth >= 0.5, 1 - smooth, smooth)
    sure = np.abs(smooth - 0.5) > 1e-5
    out = np.asarray(jax.jit(both)(images, keys)[0])
    np.testing.assert_allclose(out[sure], wanted[sure], atol=1e-5)


def test_solarisation_does_not_follow_the_colours():
    # A dark pixel tells the brightness, a white one whether values were inverted.
    pair = np.array([0.1, 1.0]).reshape(1, 2, 1)
    images, keys = copies(pair, 3000)
    jitter = ColorJitter(**STILL | {"brightness": 0.4}, p=1.0, solarize_p=0.3)
    out = np.asarray(jax.jit(jitter)(images, keys))[:, 0, :, 0]
    brightness, chosen = out[:, 0], out[:, 1] < 0.5
    assert abs(chosen.mean() - 0.3) < 0.042  # five standard deviations
    assert abs(np.corrcoef(brightness, chosen)[0, 1]) < 5 / math.sqrt(3000)


def test_grey_images_change_in_brightness_and_contrast_alone():
    image = np.array([0.3, 0.5, 0.4, 0.4]).reshape(2, 2, 1)
    for which in ("brightness", "contrast"):
        jitter = ColorJitter(**STILL | {which: 0.3}, p=1.0)
        jitter.check_channels(channels=1)
        out = np.asarray(jax.jit(jitter)(*copies(image, 50)), np.float64)
        assert len(np.unique(out[:, 0, 0])) == 50
        centre = 0.0 if which == "brightness" else 0.4
        factor = (out - centre)[:, :1, :1] / (0.3 - centre)
        np.testing.assert_allclose(out, centre + factor * (image - centre), atol=1e-6)


def test_colours_that_do_not_fit_the_channels_are_refused():
    ColorJitter().check_channels(3)
    for name, value in [("saturation", 0.4), ("hue", 0.1), ("gray_p", 0.2)]:
        with pytest.raises(ValueError, match=f"jitter.{name}={value}.*want 0"):
            ColorJitter(**STILL | {name: value}).check_channels(1)
    with pytest.raises(ValueError, match="5 channels: want 1 or 3"):
        ColorJitter(**STILL).check_channels(5)
    for wrong in [(0.0, 1.0), (2.0, 1.0)]:
        with pytest.raises(ValueError, match="want (0.01|least) <= "):
            ColorJitter(blur_sigma=wrong)
    with pytest.raises(ValueError, match="solarize_p=1.5"):
        ColorJitter(solarize_p=1.5)


@pytest.fixture(scope="module")
def boxes():
    """True at the pixels pasted into many images of 16 x 24."""
    images, keys = copies(np.zeros((16, 24, 1)), 6000)
    return np.asarray(jax.jit(cutmix)(images, keys)[1])


def test_cutmix_boxes_have_the_size_and_place_they_promise(boxes):
    rows, cols = boxes.any(axis=2), boxes.any(axis=1)
    np.testing.assert_array_equal(boxes, rows[:, :, None] & cols[:, None, :])
    height, width = rows.sum(axis=1), cols.sum(axis=1)
    for line, length in ((rows, height), (cols, width)):
        # One piece each.
        assert (np.diff(line.astype(int), axis=1) == 1).sum(axis=1).max() == 1
        assert length.max() == line.shape[1]
    # Of a box of side s = sqrt(1 - lambda) the border leaves s - s^2 / 4 on average,
    # each way: the mean of its square over lambda is 1/2 - 1/5 + 1/48.
    assert abs(boxes.mean() - 0.3208) < 0.018  # five standard deviations
    # What no border cuts has the image's proportions.
    inside = ~(
        boxes[:, [0, -1]].any(axis=(1, 2)) | boxes[..., [0, -1]].any(axis=(1, 2))
    )
    assert inside.sum() > 500
    assert (np.abs(height / 16 - width / 24)[inside] <= 1 / 16 + 1 / 24).all()
    # Neither direction is preferred.
    half = boxes.mean(axis=0)
    np.testing.assert_allclose(half, half[::-1], atol=0.04)
    np.testing.assert_allclose(half, half[:, ::-1], atol=0.04)


def test_cutmix_pastes_its_partner_and_nothing_else():
    random = np.random.default_rng(0)
    images = random.random((5, 8, 12, 3), np.float32)
    keys = jax.random.split(jax.random.key(0), 5)
    jitted = jax.jit(cutmix, static_argnums=2)
    for partner in (1, -2):
        mixed, pasted = map(np.asarray, jitted(images, keys, partner))
        assert 0 < pasted.mean() < 1
        for i in range(5):
            inside = pasted[i]
            other = images[(i + partner) % 5]
            np.testing.assert_array_equal(mixed[i][inside], other[inside])
            np.testing.assert_array_equal(mixed[i][~inside], images[i][~inside])
    # A box is a function of its own key.
    assert len({box.tobytes() for box in pasted}) == 5
    turned = jitted(images, keys[::-1], -2)[1]
    np.testing.assert_array_equal(turned, pasted[::-1])


@pytest.mark.parametrize("rows, partner", [(1, 1), (3, 0), (3, 3), (3, -3)])
def test_an_image_is_never_its_own_partner(rows, partner):
    images, keys = copies(np.zeros((4, 4, 1)), rows)
    with pytest.raises(ValueError, match=rf"{rows} image\(s\) with partner={partner}:"):
        cutmix(images, keys, partner)


# Mixing images and their labels.


@functools.cache
def jitted(mix: Mix):
    return jax.jit(mix)


def mixed(mix: Mix, rows: int, size=(12, 10), seed: int = 0):
    """(images, mixed images, mixed targets): every image has a label of its own."""
    rng = np.random.default_rng(seed)
    images = rng.random((rows, *size, 3)).astype(np.float32)
    keys = jax.random.split(jax.random.key(seed), rows)
    out, targets = jitted(mix)(jnp.asarray(images), jnp.eye(rows), keys)
    return images, np.asarray(out), np.asarray(targets)


def groups(values, size: int):
    return np.asarray(values).reshape(-1, size, *np.shape(values)[1:])


@pytest.mark.parametrize("group", [32, 8])
def test_mixup_has_one_share_per_group_and_the_reversed_partner(group):
    images, out, targets = mixed(Mix(mixup=0.8, group=group), 64)
    np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-6)
    shares = np.diag(targets).reshape(-1, group)
    assert (np.ptp(shares, axis=1) < 1e-6).all()  # one in each group
    assert len(np.unique(shares[:, 0].round(6))) == 64 // group
    for g, share in enumerate(shares[:, 0]):
        rows = slice(g * group, (g + 1) * group)
        mine, theirs = images[rows], images[rows][::-1]
        want = share * mine + (1 - share) * theirs
        np.testing.assert_allclose(out[rows], want, atol=1e-6)
        for i in range(group):
            other = targets[g * group + i, g * group + group - 1 - i]
            np.testing.assert_allclose(other, 1 - share, atol=1e-6)


def test_cutmix_pastes_one_box_per_group_and_its_area_is_the_share():
    seen = []
    for seed in range(20):
        images, out, targets = mixed(Mix(cutmix=1.0, group=4), 8, seed=seed)
        for g in range(2):
            rows = slice(4 * g, 4 * g + 4)
            partners = images[rows][::-1]
            box = (out[rows] == partners).all(axis=-1)
            kept = (out[rows] == images[rows]).all(axis=-1)
            assert (box ^ kept).all()
            assert (box == box[:1]).all()  # the same place in all four
            ys, xs = np.nonzero(box[0])
            if len(ys):
                assert len(ys) == (np.ptp(ys) + 1) * (np.ptp(xs) + 1)
            share = 1 - box[0].mean()
            np.testing.assert_allclose(np.diag(targets)[rows], share, atol=1e-6)
            seen.append(share)
    # Lambda is uniform, but what reaches over a border is cut off.
    assert 0.5 < np.mean(seen) < 0.9 and min(seen) < 0.4 and max(seen) > 0.95


def test_groups_choose_between_the_two():
    images, out, targets = mixed(Mix(mixup=0.8, cutmix=1.0, switch=0.3, group=2), 2000)
    partners = groups(images, 2)[:, ::-1].reshape(images.shape)
    pasted = ((out == images) | (out == partners)).all(axis=(1, 2, 3))
    share = pasted[::2].mean()
    assert abs(share - 0.3) < 5 * (0.21 / 1000) ** 0.5


def test_mixup_shares_are_beta_distributed():
    _, _, targets = mixed(Mix(mixup=0.8, group=2), 4000, size=(1, 1))
    shares = np.diag(targets)[::2]
    # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1)).
    assert abs(shares.mean() - 0.5) < 5 * (0.0962 / 2000) ** 0.5
    assert abs(shares.var() - 1 / (4 * 2.6)) < 0.01


def test_batches_that_cannot_be_grouped_are_refused():
    for rows, group in ((40, 32), (5, 32)):
        with pytest.raises(ValueError, match=f"a batch of {rows} images in groups"):
            mixed(Mix(mixup=0.8, group=group), rows)
    for fields, message in (
        (dict(mixup=-1.0), "mixup=-1.0"),
        (dict(group=3), "group=3: want an even number"),
        (dict(switch=1.5), "switch=1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            Mix(**fields)
    assert not Mix().on and Mix(cutmix=1.0).on


# Erasing.


def erased(settings: Erasing, rows: int, size=(40, 30)):
    """True at the pixels of each image that are noise, and the noise there."""
    images = jnp.full((rows, *size, 2), 7.0)  # no noise is there by chance
    keys = jax.random.split(jax.random.key(3), rows)
    out = jax.jit(lambda x, k: settings(x, k, (0.2, 0.6), (0.1, 0.3)))(images, keys)
    out = np.asarray(out)
    box = (out != 7).any(axis=-1)
    assert (box == (out != 7).all(axis=-1)).all()
    return box, out[box]


def test_erased_boxes_have_the_areas_and_ratios_asked_for():
    box, noise = erased(Erasing(p=1.0), 800)
    areas, logs = [], []
    for one in box:
        ys, xs = np.nonzero(one)
        height, width = np.ptp(ys) + 1, np.ptp(xs) + 1
        assert one.sum() == height * width
        areas.append(height * width / 1200)
        logs.append(np.log(height / width))
    assert 0.015 < min(areas) and max(areas) < 0.36
    # Uniform in .02 to 1/3, but for those that would not fit.
    assert abs(np.mean(areas) - 0.17) < 0.02 and np.quantile(areas, 0.1) < 0.07
    assert -1.5 < min(logs) and max(logs) < 1.5 and abs(np.mean(logs)) < 0.15
    # Everywhere in the image.
    assert box.any(axis=0).all()
    np.testing.assert_allclose(noise.mean(axis=0), [0.2, 0.6], atol=0.005)
    np.testing.assert_allclose(noise.std(axis=0), [0.1, 0.3], rtol=0.02)


def test_erasing_takes_its_share_of_images():
    box, _ = erased(Erasing(p=0.25), 800)
    share = box.any(axis=(1, 2)).mean()
    assert abs(share - 0.25) < 5 * (0.1875 / 800) ** 0.5
    assert not erased(Erasing(p=0.0), 10)[0].any()
    for fields in (dict(p=1.5), dict(ratio=0.0), dict(area=(0.5, 0.2))):
        with pytest.raises(ValueError, match="want"):
            Erasing(**fields)
