# SPDX-License-Identifier: Apache-2.0
"""Every evaluation at a small size, and a tiny untrained run of every objective."""

import dataclasses
import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from passes import Given, GivenSet
from small_run import CLASSES, batches
from tiny import tree_of

from mim_jax import config
from mim_jax.data.segments import Objects, box_of, runs_of
from mim_jax.evals import EVALS
from mim_jax.evals.base import Eval, Run

SIDE = 12  # pixels: SSIM's window has 11
# Fields that make an evaluation fast. One without a row is tested with its defaults.
SMALL: dict[str, dict[str, Any]] = {
    "reconstruction": dict(images=20, draws=2, inpainted=1, rows=2),
    "knn": dict(k=(3, 5), rows=2, neighbours=2),
    "linear": dict(rates=(1.0, 10.0), epochs=5, batch_size=16),
    "ridge": dict(shots=(1, 3), draws=2),
    "cka": dict(ratios=(0.5,), images=20, occlusion="model"),
    "occlusion": dict(ratios=(0.5,), images=20, draws=1, training_images=20),
    "attention": dict(rows=2, images=20),
    "tsne": dict(classes=3, images=8, perplexity=5.0),
    "robustness": dict(mistakes=2),
    "shape_bias": dict(examples=2),
    "detection": dict(shown=2, least=0.0),
    "latents": dict(fields=("label",), images=20, held_out=20, masks=8),
}


def small(name: str) -> Eval:
    fields: dict[str, Any] = SMALL[name] if name in SMALL else {}
    return EVALS[name](**fields)


@functools.cache
def objective_of(name: str) -> Any:
    return config.build_objective(tree_of(name, objective__encoder__depth=1))


@functools.cache
def run_of(name: str) -> Run:
    """A tiny run of an objective; its parameters are drawn, not trained."""
    objective = objective_of(name)
    batch = {"image": jnp.asarray(batches(1, 1, side=SIDE)[0]["image"])}
    init = jax.jit(lambda key: objective.init(key, batch))
    (params, stats), (initial, _) = (init(jax.random.key(seed)) for seed in (0, 1))
    return Run(
        objective=objective,
        params=disturbed(params),
        stats=stats,
        initial=initial,
        step=3,
        name=name,
    )


def disturbed(params: Any) -> Any:
    """Parameters with noise, since many start at zero or one."""
    noise = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: x + jnp.asarray(0.2 * noise.standard_normal(x.shape), x.dtype), params
    )


@dataclasses.dataclass(frozen=True)
class Conflicts:
    """What the labels of a set of cue conflicts mean."""

    classes = CLASSES
    members = ((0,), (1,), (2,))
    model_classes = 10
    pairs = True

    def __len__(self) -> int:
        return 12


def passes_of(size: int, labels: bool = True) -> Given:
    """24 held-out and 40 training images in batches of that size, the last one padded;
    and the set "cues", whatever the labels."""
    held_out, training = (
        batches(count, size, seed, SIDE) for count, seed in ((24, 0), (40, 1))
    )
    cues = []
    for batch in batches(12, size, 2, SIDE):
        label = batch.pop("label")
        cues.append(batch | {"labels": np.stack([label, (label + 1) % 3], axis=1)})
    if not labels:
        for batch in (*held_out, *training):
            batch["label"][:] = -1
    for batch in (*held_out, *training):
        shapes = np.full((len(batch["label"]), 2), SIDE, np.int32)
        batch.update(size=shapes, shape=shapes)
    sets = {"cues": GivenSet(Conflicts(), cues)}
    classes = CLASSES if labels else ()
    given = {index: objects(index) for index in range(24)}
    names = tuple(map(str, range(14)))
    return Given(held_out, training, classes, sets, given, names)


def objects(index: int) -> Objects:
    """Two objects of an image, one of them with a hole in its mask."""
    masks = np.zeros((2, SIDE, SIDE), bool)
    masks[0, 1:7, 2:6] = masks[1, 4:12, 5 : 9 + index % 4] = True
    masks[1, 6, 7] = False
    return Objects(
        boxes=np.array([box_of(one) for one in masks], np.float32),
        classes=np.array([index % 3, 5], np.int32),
        crowd=np.zeros(2, bool),
        areas=masks.sum(axis=(1, 2)).astype(np.float64),
        segments=[runs_of(one) for one in masks],
        ids=[0, 1],
    )


# pycocotools is in the extras `test` and `detection`; an older environment lacks it.
ALL = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name == "detection" and importlib.util.find_spec("pycocotools") is None,
            reason="no pycocotools",
        ),
    )
    for name in EVALS
]
