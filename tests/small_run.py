# SPDX-License-Identifier: Apache-2.0
"""A small network that was not trained, and images of three classes for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from passes import Given

from mim_jax.evals.base import Run
from mim_jax.models.heads import Head
from mim_jax.models.vit import Encoder
from mim_jax.objectives.cmae import CMAE

HEAD = Head(hidden=8, out=8)
CMAE_SMALL = CMAE(
    encoder=Encoder(patch=2, width=8, depth=2, heads=2),
    projector=HEAD,
    predictor=HEAD,
    mean=(0.5,),
    std=(0.25,),
)
CLASSES = ("a", "b", "c")


def batches(count, size=7, seed=0, side=8):
    """Images of three classes that differ in brightness, in padded batches."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    noise = rng.integers(0, 60, (count, side, side, 1))
    images = noise + 90 * labels[:, None, None, None]
    found = []
    for start in range(0, count, size):
        rows = slice(start, start + size)
        part = {
            "image": np.asarray(images[rows], np.uint8),
            "label": labels[rows].astype(np.int32),
            "index": np.arange(count, dtype=np.int32)[rows],
        }
        short = size - len(part["label"])
        part = {
            name: np.concatenate(
                [value, np.full_like(value[:1], fill).repeat(short, 0)]
            )
            for (name, value), fill in zip(part.items(), (0, -1, -1), strict=True)
        }
        found.append(part | {"valid": np.arange(size) < size - short})
    return found


@functools.cache
def run():
    batch = {"image": jnp.asarray(batches(1, 1)[0]["image"])}
    init = jax.jit(lambda key: CMAE_SMALL.init(key, batch)[0])
    params, initial = init(jax.random.key(0)), init(jax.random.key(1))
    # Random tables make attention and features differ between patches.
    noise = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: x + jnp.asarray(0.2 * noise.standard_normal(x.shape), x.dtype), params
    )
    return Run(objective=CMAE_SMALL, params=params, initial=initial, step=3, name="x")


def passes(held_out=24, size=7):
    return Given(batches(held_out, size), batches(40, 9, seed=1), CLASSES)
