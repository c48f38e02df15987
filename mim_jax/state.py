# SPDX-License-Identifier: Apache-2.0
"""The training state, and the two layouts of transformer blocks in it."""

import dataclasses
import operator
import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

_INIT = 2**32 - 1  # folded into the key for parameters; steps fold in their number
_BLOCK = re.compile(r"block(\d\d+)")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that training carries from one step to the next.

    The fields may also hold shapes or shardings in place of arrays.

    Attributes:
        step: number of optimiser steps done, int32.
        params: trained parameters.
        teacher: a second tree like (part of) params, or None.
        stats: running statistics; {} if the objective has none.
        opt_state: state of the optimiser.
        key: base key of the run. It never changes; each step folds its number into it.
        memory: the memory of a masking (`Masking.first_memory`), or None.
    """

    step: Any
    params: Any
    teacher: Any
    stats: Any
    opt_state: Any
    key: Any
    memory: Any = None


def create(
    objective, tx, *, seed: int, image_shape: tuple[int, int, int], scan: bool
) -> TrainState:
    """The state before the first step; jit it with out_shardings to create each array
    in its shards.

    Args:
        objective: gives one parameter tree per block, whatever `scan` is.
        tx: optax transformation.
        seed: seed of the run; all randomness of its steps comes from it.
        image_shape: rows, columns, channels.
        scan: stack the blocks' parameters, so that networks run the blocks as a loop.
    """
    params, stats = initial(objective, seed=seed, image_shape=image_shape)
    params, stats = layout(params, scan), layout(stats, scan)
    return begun(objective, tx, params, stats, seed=seed, image_shape=image_shape)


def begun(
    objective, tx, params, stats, *, seed: int, image_shape: tuple[int, int, int]
) -> TrainState:
    """The state before the first step, around its parameters and statistics.

    Args:
        params, stats: in the layout in which the networks run.
        objective, tx, seed, image_shape: as for `create`.
    """
    step = jnp.zeros((), jnp.int32)
    return TrainState(
        step=step,
        params=params,
        teacher=objective.teacher(None, params, step),
        stats=stats,
        opt_state=tx.init(params),
        key=run_key(seed),
        memory=objective.first_memory(image_shape),
    )


def initial(objective, *, seed: int, image_shape: tuple[int, int, int]) -> tuple:
    """(parameters, statistics) from which a run with this seed starts; blocks are not
    stacked."""
    batch = {"image": jnp.zeros((1, *image_shape), jnp.uint8)}
    return objective.init(jax.random.fold_in(run_key(seed), _INIT), batch)


def layout(tree: Any, scan: bool) -> Any:
    """A tree of single blocks; with `scan`, the same with its blocks stacked."""
    return stack_blocks(tree) if scan else tree


def run_key(seed: int) -> Key[Array, ""]:
    """The base key of a run."""
    # The generator is named since JAX's default may differ by platform and by number
    # of devices.
    return jax.random.key(seed, impl="threefry2x32")


def stack_blocks(tree: Any) -> Any:
    """Stacks `block00`, `block01`, ... of every dict to one `blocks`, axis 0.

    Works on any pytree that holds such dicts, optimiser states included.
    """
    return _on_dicts(tree, _stack)


def unstack_blocks(tree: Any) -> Any:
    """Inverse of `stack_blocks`; checkpoints have this layout."""
    return _on_dicts(tree, _unstack)


def _on_dicts(tree, change):
    """`change` applied to every outermost dict of a pytree."""

    def visit(node):
        return change(node) if isinstance(node, dict) else node

    return jax.tree.map(visit, tree, is_leaf=lambda node: isinstance(node, dict))


def _stack(tree):
    if not isinstance(tree, dict):
        return tree
    blocks = [name for name in tree if _BLOCK.fullmatch(name)]
    blocks.sort(key=lambda name: int(name.removeprefix("block")))
    rest = {name: _stack(tree[name]) for name in tree if name not in blocks}
    if blocks:
        rest["blocks"] = jax.tree.map(
            lambda *leaves: jnp.stack(leaves), *(tree[name] for name in blocks)
        )
    return rest


def _unstack(tree):
    if not isinstance(tree, dict):
        return tree
    rest = {name: _unstack(tree[name]) for name in tree if name != "blocks"}
    if "blocks" in tree:
        depth = jax.tree.leaves(tree["blocks"])[0].shape[0]
        for i in range(depth):
            block = jax.tree.map(operator.itemgetter(i), tree["blocks"])
            rest[f"block{i:02d}"] = block
    return rest
