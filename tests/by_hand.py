# SPDX-License-Identifier: Apache-2.0
"""Parts of the siamese methods in float64 numpy, one token at a time."""

import math

import numpy as np


def unit(x):
    """Rows of length 1."""
    return x / np.sqrt((x * x).sum(axis=-1, keepdims=True))


def info_nce(query, key, negatives, tau):
    """Eq. (9) of arXiv:2208.04164 for every token [b, n] of two sets of unit rows."""
    images, positions, width = query.shape
    losses = np.empty((images, positions))
    for b in range(images):
        for i in range(positions):
            against = {
                "same_position": key[:, i],
                "same_image": key[b],
                "all": key.reshape(-1, width),
            }[negatives]
            logits = [query[b, i] @ other / tau for other in against]
            share = math.exp(query[b, i] @ key[b, i] / tau)
            losses[b, i] = -math.log(share / sum(map(math.exp, logits)))
    return losses


def batch_norm(x):
    """Each channel over everything else, without scale and bias."""
    rows = x.reshape(-1, x.shape[-1])
    centred = rows - rows.mean(axis=0)
    return (centred / np.sqrt((centred**2).mean(axis=0) + 1e-5)).reshape(x.shape)


def layer_norm(x):
    """Each token over its channels, without scale and bias."""
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)


def head(params, x, norm="batch", activation="gelu", last_norm=False):
    """`mim_jax.models.heads.Head` as its docstring describes it."""
    layers = sum(name.startswith("fc") for name in params)
    normalise = {"batch": batch_norm, "layer": layer_norm, "none": lambda x: x}[norm]
    for i in range(1, layers + 1):
        x = x @ np.asarray(params[f"fc{i}"]["kernel"], np.float64)
        x = x + np.asarray(params[f"fc{i}"].get("bias", 0.0), np.float64)
        if i == layers:
            break
        x = normalise(x)
        if norm != "none":
            x = x * np.asarray(params[f"norm{i}"]["scale"], np.float64)
            x = x + np.asarray(params[f"norm{i}"]["bias"], np.float64)
        if activation == "gelu":
            x = x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
        else:
            x = np.maximum(x, 0)
    return batch_norm(x) if last_norm else x
