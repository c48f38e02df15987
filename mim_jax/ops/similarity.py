# SPDX-License-Identifier: Apache-2.0
"""How alike two images are: MSE, PSNR, SSIM and FSIM, batched and differentiable.

SSIM and FSIM need many intermediate numbers per pixel. On a CPU they work on one image
after the other, so that these numbers stay in its caches (benchmarks/similarity.py).
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


def mse(
    image: Float[Array, "b h w c"],
    reference: Float[Array, "b h w c"],
    region: Bool[Array, "b h w"] | None = None,
) -> Float[Array, " b"]:
    """Mean squared error of each image over the pixels where `region` is True (all of
    them if None)."""
    error = jnp.mean((image - reference) ** 2, axis=-1)
    if region is None:
        return error.mean(axis=(1, 2))
    weight = region.astype(error.dtype)
    return (error * weight).sum(axis=(1, 2)) / weight.sum(axis=(1, 2))


def psnr(
    image: Float[Array, "b h w c"],
    reference: Float[Array, "b h w c"],
    region: Bool[Array, "b h w"] | None = None,
) -> Float[Array, " b"]:
    """Peak signal-to-noise ratio of each image in dB, for values in 0..1.

    -10 log10 of the mean squared error, over the pixels where `region` is True (all of
    them if None). Identical images give infinity. The mean of these values over images
    differs from the PSNR of the mean error: say which one is reported.
    """
    return -10 * jnp.log10(mse(image, reference, region))


def ssim(
    image: Float[Array, "b h w c"], reference: Float[Array, "b h w c"]
) -> Float[Array, " b"]:
    """Structural similarity of each image, for values in 0..1; 1 is identity.

    Gaussian window of deviation 1.5 and 11 pixels, K = (.01, .03), population
    covariances, mean over channels and over the positions where the window fits.

    Raises:
        ValueError: a side is shorter than the window.
    Source: Wang et al. 2004, doi:10.1109/TIP.2003.819861, section III.
    """
    if min(image.shape[1:3]) < 11:
        raise ValueError(
            f"SSIM of images of {image.shape[1]}x{image.shape[2]}: want at least 11x11,"
            " the size of its window"
        )
    window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = (window / window.sum()).tolist()
    height, width, channels = image.shape[1:]

    def down(lanes):
        return _windowed(lanes, window), _windowed(lanes**2, window)

    def across(lanes):
        return tuple(_windowed(one, window, axis=1, step=channels) for one in lanes)

    def of(image, reference):
        # With the sum s and the difference d of both images, 4 xy = s^2 - d^2 and
        # 2 (x^2 + y^2) = s^2 + d^2: only these two images and their squares are
        # filtered, and equal images give exactly 1.
        lanes = jnp.stack([image + reference, image - reference])
        lanes = lanes.reshape(2, height, width * channels)
        # Two loops: XLA would fuse a single one to sums of sums, eleven times the work.
        mean, square = jax.lax.map(across, jax.lax.map(down, lanes))
        power = mean**2
        (s, d), (own_s, own_d) = power, square - power
        luminance = ((s - d) / 2 + 0.01**2) / ((s + d) / 2 + 0.01**2)
        structure = (own_s - own_d) / 2 + 0.03**2
        structure = structure / ((own_s + own_d) / 2 + 0.03**2)
        return (luminance * structure).mean()

    return _per_image(of)(image, reference)


def fsim(
    image: Float[Array, "b h w c"],
    reference: Float[Array, "b h w c"],
    chromatic: bool = False,
) -> Float[Array, " b"]:
    """Feature similarity of each image, for values in 0..1; 1 is identity.

    It compares phase congruency (log-Gabor filters of 4 scales and 4 orientations) and
    Scharr gradients of the luminance; the larger congruency is a pixel's weight. Images
    whose shorter side is 384 or more are first averaged down to about 256.

    Args:
        chromatic: FSIMc, which also compares the I and Q of YIQ.
    Raises:
        ValueError: neither 1 nor 3 channels, or `chromatic` for grey images.
    Source: Zhang et al. 2011, doi:10.1109/TIP.2011.2109730, with its constants
        T1 = .85, T2 = 160, T3 = T4 = 200, lambda = .03 on the scale 0..255.
    """
    channels = image.shape[-1]
    if channels not in (1, 3) or (chromatic and channels == 1):
        raise ValueError(
            f"FSIM{'c' if chromatic else ''} of {channels} channel(s): want "
            f"{'3' if chromatic else '1 or 3'}"
        )
    side = max(1, round(min(image.shape[1:3]) / 256))

    def of(image, reference):
        planes = _pooled(jnp.stack([image, reference]) * 255, side)
        if channels == 3:
            # Full precision: by default some devices multiply matrices with few digits.
            planes = jnp.einsum(
                "bhwc,kc->kbhw",
                planes,
                jnp.asarray(_YIQ, planes.dtype),
                precision="highest",
            )
        else:
            planes = jnp.moveaxis(planes, -1, 0)
        one, other = (phase_congruency(grey) for grey in planes[0])
        weight = jnp.maximum(one, other)
        score = _alike(one, other, 0.85) * weight
        slope, other_slope = _scharr(planes[0])
        score = score * _alike(slope, other_slope, 160.0)
        if chromatic:
            (i, other_i), (q, other_q) = planes[1:]
            hue = _alike(i, other_i, 200.0) * _alike(q, other_q, 200.0)
            score = score * jnp.abs(hue) ** 0.03
        return score.sum() / weight.sum()

    return _per_image(of)(image, reference)


def phase_congruency(image: Float[Array, "h w"]) -> Float[Array, "h w"]:
    """Phase congruency of a grey image, in 0..1: 1 where all scales agree in phase.

    Source: Kovesi 1999, "Image features from phase congruency", with the noise
        threshold of FSIM: 2 deviations of the Rayleigh distribution of noise energy,
        estimated from the median response at the smallest scale, over 1.7.
    """
    bank = _log_gabor(*image.shape)
    spectrum = jnp.fft.fft2(image)
    tiny = jnp.finfo(image.dtype).eps

    def orientation(filters, noise):
        # With a list instead of an array axis, XLA fuses all this to one loop over
        # pixels.
        responses = [jnp.fft.ifft2(spectrum * scale) for scale in filters]
        pairs = [(response.real, response.imag) for response in responses]
        squares = [even**2 + odd**2 for even, odd in pairs]
        total_even, total_odd = (_sum(parts) for parts in zip(*pairs, strict=True))
        length = _root(total_even**2 + total_odd**2) + tiny
        cosine, sine = total_even / length, total_odd / length
        energy = _sum(
            even * cosine + odd * sine - jnp.abs(even * sine - odd * cosine)
            for even, odd in pairs
        )
        tau = _root(_lower_median(squares[0].ravel()) * noise)
        threshold = tau * (math.sqrt(math.pi / 2) + 2 * math.sqrt(2 - math.pi / 2))
        above = jnp.maximum(energy - threshold / 1.7, 0)
        return above, _sum(_root(square) for square in squares)

    filters = jnp.asarray(bank.filters, spectrum.dtype)
    parts = [orientation(f, n) for f, n in zip(filters, bank.noise, strict=True)]
    energy, amplitude = (_sum(part) for part in zip(*parts, strict=True))
    return (energy + tiny) / (amplitude + tiny)


_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


class _Bank(NamedTuple):
    filters: np.ndarray  # orientations, scales, h, w; zero frequency in the corner
    noise: list[float]  # Rayleigh parameter squared over the median square response


@functools.cache
def _log_gabor(height: int, width: int) -> _Bank:
    def frequencies(length):
        # For odd lengths the range includes both -.5 and .5, as in the authors' code.
        steps = length - length % 2
        return np.fft.ifftshift((np.arange(length) - length // 2) / steps)

    rows, cols = np.meshgrid(frequencies(height), frequencies(width), indexing="ij")
    radius, angle = np.hypot(rows, cols), np.arctan2(-rows, cols)
    low_pass = 1 / (1 + (radius / 0.45) ** 30)
    radius[0, 0] = 1
    radial = []
    for scale in range(4):
        wavelength = 6 * 2**scale
        gabor = np.exp(-(np.log(radius * wavelength) ** 2) / (2 * math.log(0.55) ** 2))
        gabor[0, 0] = 0
        radial.append(gabor * low_pass)
    filters, noise = [], []
    for number in range(4):
        turned = angle - number * math.pi / 4
        apart = np.abs(np.arctan2(np.sin(turned), np.cos(turned)))
        deviation = math.pi / (4 * 1.2)
        bank = np.stack(radial) * np.exp(-(apart**2) / (2 * deviation**2))
        kernels = np.real(np.fft.ifft2(bank)) * math.sqrt(height * width)
        power = 1 / (math.log(2) * (bank[0] ** 2).sum())
        noise.append(float(power * (kernels.sum(axis=0) ** 2).sum()))
        filters.append(bank)
    return _Bank(np.stack(filters), noise)


def _per_image(function: Callable[..., Array]) -> Callable[..., Array]:
    """Turns a function of one pair of images into a function of batches."""
    if jax.default_backend() != "cpu":
        return jax.vmap(function)
    # On a CPU one image at a time stays in the cache.
    return lambda *batches: jax.lax.map(lambda rows: function(*rows), batches)


def _lower_median(values: Float[Array, " n"]) -> Float[Array, ""]:
    """The element at (n - 1) // 2 of the sorted values, which must be >= 0.

    If n is even, that is the smaller of the two middle elements, as in the
    implementations that papers use. The search goes bit by bit, which takes a tenth of
    the time of sorting.
    """
    # Floats >= 0 have the same order as their bits read as integers.
    size = 8 * values.dtype.itemsize
    kind = jnp.dtype(f"int{size}")
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(values), kind)
    rank = (len(values) - 1) // 2

    def narrow(step, found):
        # `found` becomes the largest number with at most `rank` values below it.
        trial = found | (jnp.ones((), kind) << (size - 2 - step).astype(kind))
        return jnp.where((bits < trial).sum() <= rank, trial, found)

    found = jax.lax.fori_loop(0, size - 1, narrow, jnp.zeros((), kind))
    return values[(bits == found).argmax()]  # indexing `values` has a gradient


def _windowed(
    lanes: Float[Array, "h n"], window: list[float], axis: int = 0, step: int = 1
) -> Float[Array, "y x"]:
    """Weighted sums over a window of rows or columns `step` apart, where it fits."""
    length = lanes.shape[axis] - step * (len(window) - 1)
    return _sum(
        weight * jax.lax.slice_in_dim(lanes, i * step, i * step + length, axis=axis)
        for i, weight in enumerate(window)
    )


def _pooled(images: Float[Array, "b h w c"], side: int) -> Float[Array, "b y x c"]:
    """Means over squares; rows and columns that do not fill a square are left out."""
    rows, cols = images.shape[1] // side, images.shape[2] // side
    images = images[:, : rows * side, : cols * side]
    shape = (images.shape[0], rows, side, cols, side, images.shape[3])
    return images.reshape(shape).mean(axis=(2, 4))


def _scharr(images: Float[Array, "b h w"]) -> Float[Array, "b h w"]:
    """Length of the gradient by Scharr's filters; the image is padded with zeros."""
    around = jnp.pad(images, ((0, 0), (1, 1), (1, 1)))

    def along(images, axis, weights):
        length = images.shape[axis] - 2
        parts = [
            weight * jax.lax.slice_in_dim(images, i, i + length, axis=axis)
            for i, weight in enumerate(weights)
        ]
        return parts[0] + parts[1] + parts[2]

    smooth, slope = (3 / 16, 10 / 16, 3 / 16), (-1.0, 0.0, 1.0)
    x = along(along(around, 1, smooth), 2, slope)
    y = along(along(around, 2, smooth), 1, slope)
    return _root(x * x + y * y)


def _sum(parts: Iterable[Array]) -> Array:
    return functools.reduce(jnp.add, parts)


def _alike(one: Array, other: Array, constant: float) -> Array:
    return (2 * one * other + constant) / (one * one + other * other + constant)


def _root(square: Array) -> Array:
    """Square root with a finite gradient at 0."""
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)
