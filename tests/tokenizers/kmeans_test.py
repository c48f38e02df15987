# SPDX-License-Identifier: Apache-2.0
"""Tokens are the nearest codewords, by a search of our own."""

import itertools
import json
import pathlib
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.data.sources.photos import TRAIN, Photos
from mim_jax.ops.patches import Grid
from mim_jax.tokenizers import kmeans
from mim_jax.tokenizers.kmeans import KMeans, codebook

ROOT = pathlib.Path(__file__).parents[2]
tokens_of = jax.jit(KMeans().__call__, static_argnums=1)


def nearest(small):
    """The codeword nearest to 4 x 4 x 3 numbers in 0..1, by a plain search."""
    errors = [((small - word / 255) ** 2).sum() for word in codebook().astype(float)]
    return int(np.argmin(errors))


def draw(*shape):
    """Images that are neither flat nor all noise, so that many words are near."""
    random = np.random.RandomState(0)
    images = 0.5 + 0.2 * random.standard_normal((shape[0], 1, 1, shape[-1]))
    return np.clip(images + 0.1 * random.standard_normal(shape), 0, 1)


# Linear interpolation of two pixels at the centres of four.
FOUR_OF_TWO = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
# Eight pixels at the centres of four: means of pairs.
FOUR_OF_EIGHT = np.kron(np.eye(4), np.full((1, 2), 0.5))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "patch, weights", [(2, FOUR_OF_TWO), (4, np.eye(4)), (8, FOUR_OF_EIGHT)]
)
def test_a_token_is_the_nearest_codeword(patch, weights, channels):
    grid = Grid(rows=2, cols=3, patch=patch)
    images = draw(4, 2 * patch, 3 * patch, channels)
    want = np.zeros((4, 6), int)
    for image, row, col in itertools.product(range(4), range(2), range(3)):
        part = images[image, row * patch :, col * patch :][:patch, :patch]
        small = np.einsum("ip,jq,pqc->ijc", weights, weights, part)
        if channels == 1:
            small = np.concatenate([small] * 3, axis=-1)
        want[image, 3 * row + col] = nearest(small)
    got = tokens_of(jnp.asarray(images, jnp.float32), grid)
    np.testing.assert_array_equal(got, want)
    assert got.dtype == jnp.int32 and len(np.unique(want)) > 5


def test_every_codeword_is_its_own_token():
    words = codebook()
    strip = np.concatenate(list(words), axis=1)[None]  # 4 x 2048 pixels
    images = jnp.asarray(strip, jnp.float32) / 255
    tokens = tokens_of(images, Grid(rows=1, cols=512, patch=4))
    np.testing.assert_array_equal(tokens[0], np.arange(512))


def test_a_side_that_four_does_not_divide_stays_within_its_patch():
    grid = Grid(rows=2, cols=2, patch=6)
    images = draw(1, 12, 12, 3)
    images[0, :6, :6] = codebook()[100].mean(axis=(0, 1)) / 255  # one colour
    first = tokens_of(jnp.asarray(images, jnp.float32), grid)
    assert first[0, 0] == nearest(np.broadcast_to(images[0, 0, 0], (4, 4, 3)))
    images[0, 6:] = images[0, 6:, ::-1] ** 2
    images[0, :, 6:] = 1 - images[0, :, 6:]
    other = tokens_of(jnp.asarray(images, jnp.float32), grid)
    assert other[0, 0] == first[0, 0] and (other[0, 1:] != first[0, 1:]).all()


def test_the_file_says_what_made_it():
    words = codebook()
    assert words.dtype == np.uint8 and words.shape == (512, 4, 4, 3)
    assert KMeans().vocabulary == 512 == len(np.unique(words, axis=0))
    assert kmeans.CODEBOOK.stat().st_size < 60_000
    with np.load(kmeans.CODEBOOK, allow_pickle=False) as file:
        made = json.loads(file["made"].item())
    assert tuple(made["sha256"]) == TRAIN  # nothing that is held out
    assert {"numpy", "scikit-learn"} <= made["versions"].keys()
    _, script = made["command"].split()
    assert (ROOT / script).is_file()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    files = {
        path
        for pattern in settings["tool"]["setuptools"]["package-data"]["mim_jax"]
        for path in (ROOT / "mim_jax").glob(pattern)
    }
    assert kmeans.CODEBOOK in files  # it is in the wheel


def test_codewords_fit_photographs_that_are_held_out():
    source = Photos().held_out()
    images = [source[index]["image"][:256, :256] for index in range(len(source))]
    images = np.stack(images) / 255
    tokens = np.asarray(
        tokens_of(jnp.asarray(images, jnp.float32), Grid(rows=16, cols=16, patch=16))
    )
    small = images.reshape(5, 16, 4, 4, 16, 4, 4, 3).mean(axis=(3, 6))
    small = small.transpose(0, 1, 3, 2, 4, 5).reshape(-1, 48)
    words = codebook().reshape(512, 48) / 255
    errors = ((small - words[tokens.ravel()]) ** 2).mean()
    # Measured: 18.5 % of the variance is left.
    assert errors < 0.25 * small.var(axis=0).mean()
    assert len(np.unique(tokens)) > 150


def test_the_file_is_opened_once(monkeypatch):
    opened = []
    load = np.load
    monkeypatch.setattr(np, "load", lambda *a, **k: opened.append(a) or load(*a, **k))
    codebook.cache_clear()
    KMeans().check_shape((8, 8, 1))
    KMeans()(jnp.zeros((1, 4, 4, 3)), Grid(rows=1, cols=1, patch=4))
    assert len(opened) == 1


def test_other_channels_have_no_tokens():
    with pytest.raises(ValueError, match="'kmeans' for images of 5 channels: want 1"):
        KMeans().check_shape((8, 8, 5))
