# SPDX-License-Identifier: Apache-2.0
"""Crops and resizes against the formula of the kernel; boxes and masks against pixels
painted into the image."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mim_jax.data import transforms
from mim_jax.data.sources.photos import Photos


def pattern(rows, cols, channels, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (rows, cols, channels), dtype=np.uint8)


def bicubic(image, size):
    """The resized image in 64-bit floats, from the formula of the kernel."""

    def kernel(x):
        x = np.abs(x)
        near = 1.5 * x**3 - 2.5 * x**2 + 1
        far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        return np.where(x < 1, near, np.where(x < 2, far, 0.0))

    def weights(old, new):
        centres = (np.arange(new)[:, None] + 0.5) * old / new
        weight = kernel((np.arange(old) + 0.5 - centres) / max(old / new, 1))
        return weight / weight.sum(axis=1, keepdims=True)

    rows, cols = (
        weights(old, new) for old, new in zip(image.shape, size, strict=False)
    )
    return np.tensordot(cols, np.tensordot(rows, image, 1), (1, 1)).swapaxes(0, 1)


def test_crop_boxes_follow_their_distribution():
    rows, cols, scale, ratio = 300, 450, (0.2, 1.0), (3 / 4, 4 / 3)
    rng = np.random.default_rng(1)
    boxes = np.array(
        [transforms.sample_box((rows, cols), scale, ratio, rng) for _ in range(20_000)]
    )
    top, left, height, width = boxes.T
    assert (boxes >= 0).all()
    assert (top + height <= rows).all() and (left + width <= cols).all()

    # The same distribution by rejection of continuous numbers, with another generator.
    rng = np.random.default_rng(2)
    area = rng.uniform(*scale, 100_000) * rows * cols
    aspect = np.exp(rng.uniform(*np.log(ratio), 100_000))
    high, wide = np.sqrt(area / aspect), np.sqrt(area * aspect)
    fits = (high <= rows + 0.5) & (wide <= cols + 0.5)
    quantiles = np.linspace(0.05, 0.95, 10)
    for got, want in (
        (height, high[fits]),
        (width, wide[fits]),
        (height * width, area[fits]),
        (np.log(width / height), np.log(aspect[fits])),
    ):
        want = np.quantile(want, quantiles)
        tolerance = 0.02 * (want[-1] - want[0])
        np.testing.assert_allclose(np.quantile(got, quantiles), want, atol=tolerance)
    for place, room in ((top, rows - height), (left, cols - width)):
        inside = place[room > 20] / room[room > 20]
        assert abs(inside.mean() - 0.5) < 0.01 and abs(inside.std() - 12**-0.5) < 0.01


@pytest.mark.parametrize(
    ("shape", "want"),
    [  # no box fits: the largest central one whose ratio is in range
        ((10, 1000), (0, 493, 10, 13)),
        ((1000, 10), (493, 0, 13, 10)),
        ((1, 1000), (0, 499, 1, 1)),
    ],
)
def test_crop_box_falls_back_to_the_centre(shape, want):
    rng = np.random.default_rng(0)
    assert transforms.sample_box(shape, (1.0, 1.0), (3 / 4, 4 / 3), rng) == want


def test_crop_box_is_the_whole_image_when_nothing_fits_but_the_ratio_is_right():
    class Greatest(np.random.Generator):  # its boxes never fit
        def uniform(self, least, greatest):
            return greatest

    rng = Greatest(np.random.PCG64(0))
    box = transforms.sample_box((30, 30), (1.0, 1.0), (0.5, 2.0), rng)
    assert box == (0, 0, 30, 30)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("size", [(7, 9), (40, 30), (20, 24), (40, 6)])
def test_resize_is_bicubic_antialiased(channels, size):
    # Middle levels, so that neither pass leaves 0..255 and is cut there.
    image = 80 + pattern(20, 24, channels) // 3
    got = transforms.resize(image, size)
    np.testing.assert_allclose(got, bicubic(image, size), atol=1.25)


def test_resize_of_photographs_is_pillows_to_a_fraction_of_a_level():
    for record in Photos():
        image = record["image"][:375, :500]
        want = Image.fromarray(image).resize((224, 210), Image.Resampling.BICUBIC)
        difference = np.abs(
            transforms.resize(image, (210, 224)) - np.asarray(want, int)
        )
        assert difference.mean() < 0.3 and difference.max() <= 16


def test_a_random_view_is_the_resized_box_and_sees_nothing_else():
    image, size = 80 + pattern(40, 50, 3) // 3, (16, 12)
    for seed in range(10):
        top, left, rows, cols = transforms.sample_box(
            (40, 50), (0.2, 1.0), (0.5, 2.0), np.random.default_rng(seed)
        )
        box = image[top : top + rows, left : left + cols]
        view = transforms.sample_view(
            (40, 50), size, (0.2, 1.0), (0.5, 2.0), np.random.default_rng(seed)
        )
        want = bicubic(box, size)
        np.testing.assert_allclose(view.image(image), want, atol=1.25)
        other = dataclasses.replace(view, mirrored=True)
        np.testing.assert_allclose(other.image(image), want[:, ::-1], atol=1.25)


@settings(max_examples=300, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 600), st.integers(1, 600)),
    scale=st.lists(st.floats(0.01, 1), min_size=2, max_size=2).map(
        lambda pair: tuple(sorted(pair))
    ),
    ratio=st.lists(st.floats(0.2, 5), min_size=2, max_size=2).map(
        lambda pair: tuple(sorted(pair))
    ),
    retry=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_box_is_smaller_than_the_least(shape, scale, ratio, retry, seed):
    least = transforms.least_box(shape, scale, ratio)
    rng = np.random.default_rng(seed)
    for _ in range(5):
        box = transforms.sample_box(shape, scale, ratio, rng, retry)
        assert box[2] >= math.floor(least[0]) and box[3] >= math.floor(least[1])


def test_one_view_of_two_is_mirrored_if_asked():
    shape, scale = (30, 40), (0.2, 1.0)
    count = 0
    for seed in range(2000):
        views = [
            transforms.sample_view(
                shape, (8, 8), scale, scale, np.random.default_rng(seed), flip=flip
            )
            for flip in (False, True)
        ]
        assert not views[0].mirrored and views[0].box == views[1].box
        count += views[1].mirrored
    assert abs(count / 2000 - 0.5) < 0.05


def test_mirror():
    image = pattern(3, 4, 5)
    np.testing.assert_array_equal(transforms.mirror(image), np.fliplr(image))


@pytest.mark.parametrize(
    ("shape", "size", "fraction", "whole", "corner"),
    [  # whole: rows, columns after the resize; corner: top, left of the cut
        ((300, 400), (224, 224), 0.875, (256, 341), (16, 58)),
        ((400, 300), (224, 224), 0.875, (341, 256), (58, 16)),
        ((403, 300), (224, 224), 0.875, (343, 256), (60, 16)),  # 343.9 rows
        ((100, 100), (32, 64), 1.0, (64, 64), (16, 0)),
        ((8, 8), (32, 32), 1.0, (32, 32), (0, 0)),
        ((3, 500), (16, 16), 0.5, (32, 5333), (8, 2658)),
    ],
)
def test_centre_crop(shape, size, fraction, whole, corner):
    image = 80 + pattern(*shape, 3) // 3
    (top, left), (rows, cols) = corner, size
    want = bicubic(image, whole)[top : top + rows, left : left + cols]
    got = transforms.centre_crop(image, size, fraction)
    np.testing.assert_allclose(got, want, atol=1.25)


def torchvision_rule(shape, short, side):
    """(resized rows and columns, top and left) of Resize(short) and CenterCrop(side),
    from the formulas of torchvision.transforms.functional."""
    height, width = shape
    if width <= height:
        resized = int(short * height / width), short
    else:
        resized = short, int(short * width / height)
    return resized, tuple(int(round((length - side) / 2.0)) for length in resized)


# The same by hand: image, Resize, CenterCrop, resized image, corner. Python rounds 58.5
# to 58, 59.5 to 60, 15.5 to 16 and 34.5 to 34.
STORED = [
    ((375, 500), 256, 224, (256, 341), (16, 58)),
    ((500, 375), 256, 224, (341, 256), (58, 16)),
    ((333, 500), 256, 224, (256, 384), (16, 80)),
    ((403, 300), 256, 224, (343, 256), (60, 16)),
    ((427, 640), 256, 224, (256, 383), (16, 80)),
    ((100, 160), 64, 33, (64, 102), (16, 34)),
]


@pytest.mark.parametrize("shape, short, side, resized, corner", STORED)
def test_the_centre_view_is_where_torchvision_puts_it(
    shape, short, side, resized, corner
):
    assert torchvision_rule(shape, short, side) == (resized, corner)
    view = transforms.centre_view(shape, (side, side), side / short)
    assert (view.resized, view.corner) == (resized, corner)


@settings(max_examples=500, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 900), st.integers(1, 900)),
    side=st.integers(1, 300),
    more=st.integers(0, 100),
)
def test_the_centre_view_follows_the_rule_at_every_size(shape, side, more):
    short = side + more
    view = transforms.centre_view(shape, (side, side), side / short)
    assert (view.resized, view.corner) == torchvision_rule(shape, short, side)


def test_centre_crop_always_has_its_size():
    for rows, cols in np.random.default_rng(0).integers(1, 60, (200, 2)):
        for fraction in (0.3, 0.875, 1.0):
            crop = transforms.centre_crop(pattern(rows, cols, 1), (13, 17), fraction)
            assert crop.shape == (13, 17, 1)
            assert math.isfinite(crop.mean())


def test_one_draw_is_cut_to_the_image():
    # The image is twice as wide as high: a square of its whole area does not fit.
    rng = np.random.default_rng(0)
    boxes = [
        transforms.sample_box((20, 40), (1.0, 1.0), (1.0, 1.0), rng, retry=False)
        for _ in range(200)
    ]
    assert {(rows, cols) for _, _, rows, cols in boxes} == {(20, 28)}
    # The box lies anywhere. With retries, it would fall back to the centre.
    assert {left for _, left, _, _ in boxes} == set(range(13))
    assert transforms.sample_box((20, 40), (1.0, 1.0), (1.0, 1.0), rng) == (
        0,
        10,
        20,
        20,
    )


# Boxes and masks.


def some_views(count=12):
    """Views of an image of 240 x 320 pixels, random and central, mirrored or not."""
    shape = (240, 320)
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield transforms.sample_view(
            shape, (60, 90), (0.3, 1.0), (0.7, 1.4), rng, flip=True
        )
    for size, fraction in (((60, 90), 0.875), ((90, 60), 1.0), ((64, 64), 0.5)):
        view = transforms.centre_view(shape, size, fraction)
        yield view
        yield dataclasses.replace(view, mirrored=True)


def painted(rectangle, shape=(240, 320)):
    """White pixels on black at top, left, bottom, right."""
    top, left, bottom, right = rectangle
    image = np.zeros((*shape, 1), np.uint8)
    image[top:bottom, left:right] = 255
    return image


@pytest.mark.parametrize(
    "rectangle",
    [(60, 80, 180, 240), (100, 30, 200, 290), (0, 0, 240, 320), (90, 0, 150, 100)],
)
def test_boxes_lie_where_the_pixels_are(rectangle):
    image = painted(rectangle)
    box = np.array([rectangle]) / [240, 320, 240, 320]
    seen = 0
    for view in some_views():
        shown = view.image(image)[..., 0] > 127  # pixels that are white by half or more
        (got,) = view.boxes(box) * [*view.size, *view.size]
        rows, cols = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
        if len(rows):
            seen += 1
            want = [rows[0], cols[0], rows[-1] + 1, cols[-1] + 1]
            np.testing.assert_allclose(got, want, atol=0.51)
        else:
            assert min(got[2] - got[0], got[3] - got[1]) < 0.51
    assert seen >= 10


def test_a_box_outside_a_view_has_no_area():
    view = transforms.View((10, 10), (5, 5, 5, 5), (8, 8), (0, 0), (8, 8), False)
    boxes = np.array([[0.0, 0.0, 0.3, 1.0], [0.6, 0.0, 1.0, 0.5], [0.5, 0.5, 1, 1]])
    for one in (view, dataclasses.replace(view, mirrored=True)):
        top, left, bottom, right = one.boxes(boxes).T
        assert ((bottom - top) * (right - left)).tolist() == [0, 0, 1]
    none = np.zeros((0, 4), np.float32)
    assert view.boxes(none).shape == (0, 4) and view.boxes(none).dtype == np.float32


@pytest.mark.parametrize("wrong", [8.0, -0.5, np.nan])
def test_boxes_in_pixels_are_refused(wrong):
    view = transforms.View((10, 10), (5, 5, 5, 5), (8, 8), (0, 0), (8, 8), False)
    with pytest.raises(
        ValueError, match="boxes from .*: want top, left, bottom, right"
    ):
        view.boxes(np.array([[0.0, 0.0, 0.5, wrong]]))
    rounded = np.array([[0.0, -1e-6, 1.0, 1 + 1e-6]])
    assert view.boxes(rounded).tolist() == [[0, 0, 1, 1]]


def test_masks_lie_where_the_pixels_are():
    rectangles = [(60, 80, 180, 240), (100, 30, 200, 290), (90, 0, 150, 100)]
    images = [painted(rectangle) for rectangle in rectangles]
    masks = np.stack([image[..., 0] > 0 for image in images])
    for view in some_views():
        got = view.masks(masks)
        assert got.shape == (3, *view.size) and got.dtype == np.bool_
        for mask, image in zip(got, images, strict=True):
            shown = view.image(image)[..., 0]
            whole = (shown < 20) | (shown > 235)  # pixels that no edge divides
            np.testing.assert_array_equal(mask[whole], shown[whole] > 127)
            assert whole.mean() > 0.9
        # Masks of half the resolution give the same: their edges lie at even places.
        np.testing.assert_array_equal(view.masks(masks[:, ::2, ::2]), got)


def test_masks_are_sampled_at_the_centres_of_pixels():
    """Maps of the row and the column, against ramps that the resize averages."""
    rows, cols = np.mgrid[:240, :320]
    ramps = np.stack([rows, cols // 2], axis=-1).astype(np.uint8)
    inner = np.s_[3:-3, 3:-3]  # at its edges a resize sees one side only
    for view in some_views():
        found = view.masks(np.stack([rows, cols // 2]))
        want = view.image(ramps).transpose(2, 0, 1).astype(int)
        for one, other in zip(found, want, strict=True):
            difference = one[inner] - other[inner]
            assert np.abs(difference).max() <= 1
