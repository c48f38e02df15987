# SPDX-License-Identifier: Apache-2.0
"""One training step of a small MAE on 8 x 8 digits, on any mesh; what is compiled is
kept."""

import dataclasses
import functools

import jax
import numpy as np

from mim_jax import config, sharding, train
from mim_jax import state as states
from mim_jax.evals.base import Eval
from mim_jax.plan import Plan
from mim_jax.sharding import path_name

# Devices, data, fsdp, tensor.
MESHES = [(1, 1, 1, 1), (8, 8, 1, 1), (8, 2, 4, 1), (8, 4, 1, 2), (8, 2, 2, 2)]
ROWS = 16


def tree_of(**changes) -> config.Tree:
    """A small MAE whose first step has the full learning rate."""
    tree = config.experiment("train", source="digits")
    tree.steps, tree.batch_size, tree.dtype, tree.remat = 40, ROWS, "float32", "none"
    tree.objective.encoder.update(dict(patch=2, width=32, depth=2, heads=2))
    tree.objective.decoder.update(dict(width=32, depth=1, heads=2))
    tree.objective.update(dict(mean=(0.5,), std=(0.25,), normalise_target=False))
    tree.data.image_size = (8, 8)
    tree.optim.warmup_epochs = 0.0
    for path, value in changes.items():
        node = tree
        *above, name = path.split("__")
        for part in above:
            node = node[part]
        node[name] = value
    return tree


def coupled(name: str) -> config.Tree:
    """A tiny config of an objective that compares crops of digits."""
    tree = config.experiment("train", source="digits", objective=name)
    tree.steps, tree.batch_size = 40, ROWS
    tree.report = config.choose(Eval, "knn")
    tree.objective.encoder.update(dict(patch=2, width=32, depth=2, heads=2))
    tree.objective.update(dict(mean=(0.5,), std=(0.25,)))
    for view in {"jitter", "view1", "view2", "local"} & set(tree.objective):
        tree.objective[view].update(dict(saturation=0.0, hue=0.0, gray_p=0.0))
    tree.data.image_size = (8, 8)
    tree.optim.update(dict(warmup_epochs=0.0, base_lr=1.0))
    return tree


def devices(count: int) -> list:
    return jax.devices()[:count]


@functools.cache
def plan_of(count: int = 1, **changes) -> Plan:
    return Plan.of(tree_of(**changes), devices(count))


@functools.cache
def step_of(plan: Plan):
    return train.lowered(plan).compile()


@functools.cache
def first_state():
    """On the host, so that donating a copy of it spoils nothing."""
    return jax.device_get(jax.jit(plan_of(scan=False).create)())


def place(plan: Plan):
    """The first state, in the plan's layout and where the plan wants it."""
    # Keys never come to the host: a new one, since this state will be donated.
    state = dataclasses.replace(first_state(), key=states.run_key(0))
    if plan.settings.scan:
        state = states.stack_blocks(state)
    placed = jax.tree.map(lambda leaf: leaf.sharding, plan.abstract_state())
    return jax.tree.map(
        lambda leaf, where: jax.device_put(leaf, where, may_alias=False), state, placed
    )


@functools.cache
def digits(rows: int = ROWS) -> np.ndarray:
    source = plan_of().settings.data.source
    return np.stack([source[i]["image"] for i in range(rows)])


def batch_for(plan: Plan, images: np.ndarray | None = None) -> dict:
    images = digits() if images is None else images
    return {"image": jax.device_put(images, sharding.by_row(plan.mesh))}


def one_step(plan: Plan):
    """(state, metrics) on the host, blocks unstacked, after the first step."""
    state, metrics = step_of(plan)(place(plan), batch_for(plan))
    return states.unstack_blocks(jax.device_get(state)), jax.device_get(metrics)


def gradients(state) -> dict:
    """After one step from zero Adam's first moment is 0.1 times the gradient."""
    (adam,) = (part for part in state.opt_state if hasattr(part, "mu"))
    return jax.tree.map(lambda leaf: np.asarray(leaf) * 10, adam.mu)


def close(one, other, tolerance: float) -> None:
    """Leaf by leaf, relative to the leaf's largest number."""
    for (path, a), b in zip(
        jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True
    ):
        scale = max(np.abs(b).max(), 1e-3)
        assert np.abs(a - b).max() <= tolerance * scale, path_name(path)


def bits(tree) -> list[bytes]:
    def raw(leaf):
        key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if key else leaf).tobytes()

    return [raw(leaf) for leaf in jax.tree.leaves(tree)]


def on_mesh(count: int, data: int, fsdp: int, tensor: int = 1) -> Plan:
    shape = dict(mesh__data=data, mesh__fsdp=fsdp, mesh__tensor=tensor)
    return plan_of(count, scan=False, **shape)
