# SPDX-License-Identifier: Apache-2.0
"""Crops of embedded photographs under noise, blur, JPEG and masks, in float64."""

import io

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage import data


def crops() -> dict[str, np.ndarray]:
    """Images "h w 3" in 0..1: even and odd sides, and one that FSIM averages down."""
    cat, coffee = data.chelsea() / 255, data.coffee() / 255
    return {
        "cat": cat[20:180, 60:252],
        "coffee": coffee[100:201, 200:333],
        "large": coffee[:390, :500],
    }


def distort(kind: str, image: np.ndarray) -> np.ndarray:
    """One distortion of moderate strength."""
    rng = np.random.default_rng(0)
    if kind == "noise":
        return np.clip(image + rng.normal(0, 0.08, image.shape), 0, 1)
    if kind == "blur":
        return ndimage.gaussian_filter(image, (1.5, 1.5, 0))
    if kind == "jpeg":
        file = io.BytesIO()
        Image.fromarray(np.uint8(image * 255)).save(file, "JPEG", quality=20)
        return np.asarray(Image.open(file)) / 255
    masked = image.copy()
    for row, col in rng.integers(0, 80, (12, 2)):
        masked[row : row + 16, col : col + 16] = 0.5
    return masked


def pairs() -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(name, distorted, original) of every crop and distortion."""
    return [
        (f"{name} {kind}", distort(kind, image), image)
        for name, image in crops().items()
        for kind in ("noise", "blur", "jpeg", "mask")
        if name != "large" or kind == "noise"
    ]
